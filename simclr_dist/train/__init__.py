"""Pre-train: `python -m simclr_dist.train CONFIG`, also under torchrun. Read `loop.py` first.

`simclr_dist.train(config)` does it from Python: this module can be called, as it has the name of that function.
"""

import sys
from types import ModuleType

from simclr_dist.train import session


class _Callable(ModuleType):
    __call__ = staticmethod(session.train)


sys.modules[__name__].__class__ = _Callable
