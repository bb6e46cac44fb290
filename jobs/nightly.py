"""Screen one night's new studies: ``covtanet nightly``, for ``ray job submit``."""

import sys

from covtanet.commands.nightly import main

if __name__ == "__main__":
    sys.exit(main())
