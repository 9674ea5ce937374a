"""Which way the loss goes on which GPU, and what is said where Triton cannot compile. No GPU is needed for it."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simclr_dist.method import loss
from simclr_dist.method.loss import for_kernels, triton_problem

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import build

from simclr_dist.method.loss import fused

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_kernels_are_for_gpus_with_tf32(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert for_kernels(GPU, torch.float32, 256) is expected
    assert not for_kernels(GPU, torch.float64, 128)
    assert not for_kernels(GPU, torch.float32, 257)
    assert not for_kernels(torch.device("cpu"), torch.float32, 128)


def _forget() -> None:
    for function in (triton_problem, *vars(build).values()):
        getattr(function, "cache_clear", lambda: None)()


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A launch is what its first is: a C program against Python's headers, by Triton's own builder."""
    source = tmp_path / "driver.c"
    source.write_text("#include <Python.h>\n")
    further = list(inspect.signature(build._build).parameters.values())[3:]
    lists = sum(one.default is one.empty for one in further)  # which differ between versions

    def launch(self: Any, kernel: Any, *_: Any) -> None:
        build._build("driver", str(source), str(tmp_path), *[[]] * lists)

    plain = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: plain(*shape))
    monkeypatch.setattr(fused.Similarities, "_launch", launch)
    _forget()
    yield
    _forget()


@pytest.mark.usefixtures("building", "compiler")
def test_a_machine_that_can_compile() -> None:
    assert triton_problem(GPU) == ""


@pytest.mark.usefixtures("building")
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CC": "no-such-compiler"}, "No such file or directory"),
        ({"CC": "false"}, "false fails"),
        ({"PATH": "/nowhere"}, "Failed to find C compiler"),
    ],
    ids=["not there", "fails", "none"],
)
def test_a_machine_that_cannot_compile_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], why: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.warns(RuntimeWarning, match=r"^Triton cannot compile: .*; it needs a C compiler"):
        problem = triton_problem(GPU)
    assert problem.startswith(f"Triton cannot compile: {why}")
    assert triton_problem(GPU) == problem, "said once"


@pytest.mark.usefixtures("building")
def test_a_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loss, "fused")
    monkeypatch.setitem(sys.modules, "simclr_dist.method.loss.fused", None)
    with pytest.warns(RuntimeWarning, match=r"^Triton cannot be imported .*; pip install triton$"):
        assert triton_problem(GPU)


@pytest.mark.parametrize("kernel", [fused._log_sum_exp, fused._weighted_sum], ids=["log_sum_exp", "weighted_sum"])
def test_a_shape_for_ampere_stays_in_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Triton brings the assembler of any GPU along. It fits 99 KiB of shared memory, as an A10 or RTX 4090 has."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    rows, columns, options = fused._SHAPES[1]
    sizes = {"DIM": 128, "WIDTH": 128, "ROWS": rows, "COLUMNS": columns}
    kinds = dict.fromkeys(sizes, "constexpr") | dict.fromkeys(("n", "total", "first"), "i32") | {"temperature": "fp32"}
    names = kernel.arg_names
    source = ASTSource(
        kernel, {name: kinds.get(name, "*fp32") for name in names}, {(names.index(name),): size for name, size in sizes.items()}
    )
    made = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options)
    assert made.metadata.shared <= 99 * 2**10
    program = tmp_path / "kernel.cubin"
    program.write_bytes(made.asm["cubin"])
    lists = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listed = subprocess.run([lists, "--dump-resource-usage", program], capture_output=True, text=True, check=True).stdout
    [spilled] = re.findall(r"STACK:(\d+)", listed)
    assert int(spilled) <= 4 * fused._SPILLED_WORDS
