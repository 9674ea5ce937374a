"""Train: `torchrun -m simclr_dist.train CONFIG [--profile STEPS] [--key value]`. For one process: `python -m`."""

import sys

from simclr_dist.cli.exits import leave_with
from simclr_dist.cli.train import main

if __name__ == "__main__":
    sys.exit(leave_with(main(sys.argv[1:])))
