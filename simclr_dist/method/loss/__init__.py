"""Compute NT-Xent over the global batch, without the 2N x 2N matrix."""

from simclr_dist.method.loss.nt_xent import NTXentLoss, for_kernels, nt_xent_reference, triton_problem

__all__ = ["NTXentLoss", "for_kernels", "nt_xent_reference", "triton_problem"]
