"""Train CovTANet and register the model as challenger; see ``covtanet.commands.train``."""

import sys

from covtanet.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
