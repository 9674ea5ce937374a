"""Compute NT-Xent over the global batch, without the 2N x 2N matrix."""

from simclr_dist.method.loss.nt_xent import NTXentLoss, nt_xent_reference

__all__ = ["NTXentLoss", "nt_xent_reference"]
