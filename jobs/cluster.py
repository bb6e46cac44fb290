"""Re-exports of ``covtanet.runtime`` for jobs that are not commands of the package yet."""

import argparse
import sys
from pathlib import Path

from covtanet import runtime
from covtanet.runtime import RETURN_MEMORY, check_tracking, connect, start_logging
from covtanet.runtime import location as place

__all__ = ["RETURN_MEMORY", "check_tracking", "connect", "parser", "place", "start_logging"]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser named after the script."""
    return runtime.parser(doc, Path(sys.argv[0]).stem)
