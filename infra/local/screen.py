"""Screen a folder or bucket of yours with the shipped segmenter, or with another model.

python -m infra.local.screen ARCHIVE LEDGER [MODEL]     called by ``make screen``
"""

import os
import subprocess
import sys

from infra.local.services import ROOT

SHIPPED = ROOT / "models" / "v8-lung-box"
DEMO_REGISTRY = ROOT / ".demo" / "mlflow.db"
USAGE = "usage: make screen ARCHIVE=folder-or-s3-uri LEDGER=folder-or-s3-uri [MODEL=REF]"


def main() -> int:
    """Check the arguments, then run the job on this machine."""
    given = [argument.strip() for argument in sys.argv[1:4]]
    archive, ledger, model = [*given, "", "", ""][:3]  # make passes an unset variable as ""
    if not archive or not ledger:
        print(USAGE, file=sys.stderr)
        return 2
    if model.startswith("models:") and "MLFLOW_TRACKING_URI" not in os.environ:
        if not DEMO_REGISTRY.exists():
            message = "there is no registry: run make demo first, or set MLFLOW_TRACKING_URI"
            print(message, file=sys.stderr)
            return 3
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{DEMO_REGISTRY}"
    if not model:
        model = str(SHIPPED)
        text = f"{SHIPPED.name}: lesions, and a diagnosis by their share of the lungs"
        print(f"with {text}; see {SHIPPED}/README.md", flush=True)
    command = [
        sys.executable, str(ROOT / "jobs" / "screen.py"), "--archive", archive, "--ledger", ledger,
        "--model", model, "--results", f"{ledger.rstrip('/')}/_results",
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
