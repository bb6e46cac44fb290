"""make screen: the demo's registered model on a folder or bucket of one's own."""

import os
import subprocess
import sys
from pathlib import Path

from covtanet import tracking
from covtanet.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Check the arguments and the registry, then run the job on this machine."""
    archive, ledger = (argument.strip() for argument in sys.argv[1:3])
    if not archive or not ledger:
        print("usage: make screen ARCHIVE=folder-or-s3-uri LEDGER=folder-or-s3-uri", file=sys.stderr)
        return 2
    database = ROOT / ".demo" / "mlflow.db"
    if not database.exists():
        print("there is no demo model yet; run make demo first", file=sys.stderr)
        return 3
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{database}"
    try:
        tracking.version_of("champion")
    except CheckpointError:
        print("the demo's registry has no champion; run make demo first", file=sys.stderr)
        return 3
    print("The demo's model learned from phantoms: its predictions on real CT mean nothing.", flush=True)
    command = [
        sys.executable, ROOT / "jobs" / "screen.py", "--archive", archive, "--ledger", ledger,
        "--model", "models:/covtanet@champion", "--results", f"{ledger.rstrip('/')}/_results",
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
