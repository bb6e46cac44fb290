"""Promote the challenger to champion if it is no worse; see ``covtanet.commands.promote``."""

import sys

from covtanet.commands.promote import main

if __name__ == "__main__":
    sys.exit(main())
