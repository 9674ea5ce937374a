"""`torchrun -m simclr_dist.preflight.check [CONFIG] [--only NAME] [--key value ...]`."""

import sys

from simclr_dist.preflight.check.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
