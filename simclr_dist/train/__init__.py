"""Pre-training: `python -m simclr_dist.train CONFIG`, also under torchrun; `loop.py` is the page."""
