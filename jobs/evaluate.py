"""Evaluate a saved model or a training's folds; see ``covtanet.commands.evaluate``."""

import sys

from covtanet.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
