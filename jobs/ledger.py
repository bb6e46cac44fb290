"""Read a ledger: ``covtanet ledger``, for ``ray job submit``."""

import sys

from covtanet.commands.ledger import main

if __name__ == "__main__":
    sys.exit(main())
