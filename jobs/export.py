"""Write a run's results as DICOM: ``covtanet export``, for ``ray job submit``."""

import sys

from covtanet.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
