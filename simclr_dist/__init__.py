"""Distributed large-batch SimCLR: `from simclr_dist import NTXentLoss, LARS, ShardDataset, load_encoder, train`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_dist.data.reader import ShardDataset
    from simclr_dist.encoder.file import load_encoder
    from simclr_dist.method.lars import LARS
    from simclr_dist.method.loss import NTXentLoss
    from simclr_dist.train.session import train

__version__ = "0.1.0"
__all__ = ["LARS", "NTXentLoss", "ShardDataset", "load_encoder", "train"]

_HOMES = {
    "NTXentLoss": "method.loss",
    "LARS": "method.lars",
    "ShardDataset": "data.reader",
    "load_encoder": "encoder.file",
    "train": "train.session",  # while simclr_dist.train is not imported: that is a module which does the same when it is called
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `simclr-dist --help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
