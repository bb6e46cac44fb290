"""Evaluate a saved model or a training: ``covtanet evaluate``, for ``ray job submit``."""

import sys

from covtanet.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
