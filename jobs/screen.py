"""Screen an archive of chest CT: ``covtanet screen``, for ``ray job submit``."""

import sys

from covtanet.commands.screen import main

if __name__ == "__main__":
    sys.exit(main())
