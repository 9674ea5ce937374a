"""For every Python that a test starts: quick starts, and a rank's pause after each step where a test asks for it.

Most of what such a process does is to import torch and to end. A quarter of the import goes into collecting garbage, and at its
end Python collects once more, among all that torch has made. pyarrow imports pandas wherever it is installed.

WITHOUT_COMPILER, for the tests of signals, kills and restarts, which start some hundred ranks: torch's compiler, with sympy and
triton, is half of the import, though nothing is compiled. torchvision imports it for one function, an optimizer to switch it
off, and DDP to read a setting. There it waits until somebody uses it. All other tests have torch as it is.

STEP_PAUSE (seconds), for tests that must meet a rank in the middle of a run. DIES_IN_STEP, for a rank that never comes further.
"""

import atexit
import functools
import gc
import importlib
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

gc.set_threshold(100_000, 20, 100)
atexit.register(gc.freeze)  # the first one registered is called last

_COMPILER = "torch._dynamo"
_TOOLS = f"{_COMPILER}.utils"


class _Unloaded(ModuleType):
    """Stands for a module until something of it is used that is not set here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


class _NotInstalled:
    """A loader; None in sys.modules would do for Python, but not for what Cython has compiled."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {spec.name!r}: the tests hide it", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError(module)


class _Startup:
    """Asked for every module that is imported; it finds none but pandas, and acts when it is asked for certain ones."""

    def __init__(self) -> None:
        self._waits = "WITHOUT_COMPILER" in os.environ
        self._tools = _Unloaded(_TOOLS)
        self._tools.get_optimize_ddp_mode = lambda: "ddp_optimizer"  # the default
        self._tools.is_compile_supported = lambda kind: importlib.import_module(_TOOLS).is_compile_supported(kind)

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if sys.modules.get(_TOOLS) is self._tools:  # torchvision has what it wanted, and imports something else
            del sys.modules[_TOOLS]
        if self._waits and name == "torch._VF":  # the first import after that of torch._compile
            self._wait_with_the_compiler()
        elif self._waits and name == "torchvision.ops.roi_align" and _COMPILER not in sys.modules:
            sys.modules[_TOOLS] = self._tools
        elif name == "simclr_dist.train.learner" and {"STEP_PAUSE", "DIES_IN_STEP"} & set(os.environ):
            from torch.optim.optimizer import register_optimizer_step_post_hook

            if "DIES_IN_STEP" in os.environ:
                register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            register_optimizer_step_post_hook(lambda *_: time.sleep(float(os.environ.get("STEP_PAUSE", "0"))))
        return ModuleSpec(name, _NotInstalled()) if name == "pandas" else None  # type: ignore[arg-type]

    def _wait_with_the_compiler(self) -> None:
        """What it must leave alone is called as it is while there is none."""
        import torch

        disable = torch._compile._disable_dynamo

        def disabled(function: Any = None, recursive: bool = True) -> Any:
            if function is None:
                return functools.partial(disabled, recursive=recursive)
            without = disable(function, recursive)

            @functools.wraps(function)
            def call(*arguments: Any, **keywords: Any) -> Any:
                return (without if _COMPILER in sys.modules else function)(*arguments, **keywords)

            return call

        torch._compile._disable_dynamo = torch._disable_dynamo = disabled
        torch._dynamo = _Unloaded(_COMPILER)  # until the import of the real one replaces it
        torch._dynamo.utils = self._tools


sys.meta_path.insert(0, _Startup())  # type: ignore[arg-type]
