"""Calibrate a saved model: ``covtanet calibrate``, for ``ray job submit``."""

import sys

from covtanet.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
