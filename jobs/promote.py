"""Promote the challenger to champion: ``covtanet promote``, for ``ray job submit``."""

import sys

from covtanet.commands.promote import main

if __name__ == "__main__":
    sys.exit(main())
