"""Train CovTANet and register the model: ``covtanet train``, for ``ray job submit``."""

import sys

from covtanet.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
