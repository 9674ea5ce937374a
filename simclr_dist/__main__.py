"""`python -m simclr_dist VERB ...`, also under torchrun."""

import sys

from simclr_dist.cli.exits import leave_with
from simclr_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(leave_with(main()))
