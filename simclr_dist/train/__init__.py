"""Pre-train: `python -m simclr_dist.train CONFIG`, also under torchrun. Read `loop.py` first."""
