"""Write a run as one HTML page: ``covtanet report``, for ``ray job submit``."""

import sys

from covtanet.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
