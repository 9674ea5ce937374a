"""A guard for code that must not make the host wait for the device, which works without a GPU too."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a value, or has a shape that depends on one.
_FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique")
# These never reach the dispatcher on the CPU.
_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__array__")


class NoSync(TorchDispatchMode):
    """AssertionError at an operation that waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _FORBIDDEN, f"a host sync: {func}"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # by a mask: as many as are true
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"a host sync: {func} by a mask"
        found = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(found, Tensor):
            source = args[1] if name == "copy_" else args[0]
            assert not (source.is_cuda and not found.is_cuda), f"a copy from the device: {func}"
        return found


@contextmanager
def no_host_sync() -> Iterator[None]:
    """AssertionError at the first operation that would wait for a GPU; on CUDA the driver is asked to refuse as well."""

    def refuse(name: str) -> Any:
        def method(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"a host sync: Tensor.{name}")

        return method

    with ExitStack() as stack:
        for name in _METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        if torch.cuda.is_available():
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        stack.enter_context(NoSync())
        yield
