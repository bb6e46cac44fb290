"""make screen: a model on a folder or bucket of one's own; the shipped segmenter where none is named."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "ta-segnet-stacks"
DEMO = ROOT / ".demo" / "mlflow.db"


def main() -> int:
    """Check the arguments, then run the job on this machine."""
    archive, ledger, model = (argument.strip() for argument in (*sys.argv[1:4], "", "", "")[:3])
    if not archive or not ledger:
        print(
            "usage: make screen ARCHIVE=folder-or-s3-uri LEDGER=folder-or-s3-uri [MODEL=REF]",
            file=sys.stderr,
        )
        return 2
    if model.startswith("models:") and "MLFLOW_TRACKING_URI" not in os.environ:
        if not DEMO.exists():
            print(
                "there is no registry: run make demo first, or set MLFLOW_TRACKING_URI",
                file=sys.stderr,
            )
            return 3
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{DEMO}"
    if not model:
        print(
            f"with {SHIPPED.name}, which marks lesions and has no diagnosis; see {SHIPPED}/README.md",
            flush=True,
        )
    command = [
        sys.executable, ROOT / "jobs" / "screen.py", "--archive", archive, "--ledger", ledger,
        "--model", model or SHIPPED, "--results", f"{ledger.rstrip('/')}/_results",
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
