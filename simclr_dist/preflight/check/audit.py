"""Audit a loss of others on several ranks. Its gradient is compared with one process's, and with those of known faults."""

import importlib
import math
import re
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_dist.method.meeting import meet
from simclr_dist.preflight.check.findings import Finding, failed, table
from simclr_dist.preflight.check.gradient import compared, contrast
from simclr_dist.system.errors import ConfigError, crash_summary
from simclr_dist.system.ranks import read_place

_SEED, _IMAGES, _PIXELS, _DIM = 0, 32, 24, 16
_SAME = 1e-4  # of directions of gradients. float32 rounds to 1e-6; what is told apart differs by 2e-3 up to temperature 2
_FORMS = {  # by the loss's name, what an anchor's denominator leaves out
    "NT-Xent": "itself",
    "NT-Xent without the positive in its denominator (DCL)": "both",
    "the cross-entropy of each view among the other's rows (CLIP, MoCo v3)": "view",
    "NT-Xent with the anchor itself in its denominator": "",
}
_FAULTS = {
    "local": ("negatives of the own rank only", "gather the embeddings of all ranks, with their gradient"),
    "own": ("no gradient through the other ranks' embeddings", "the gather's backward must sum over the ranks"),
    "none": ("no gradient through the gathered embeddings", "all_gather has none: use a gather that has"),
    "": ("", "DDP averages over the ranks: the gradient of a mean over all rows needs the factor world_size, and no other"),
}
_Measured = tuple[float, Tensor]  # the mean of some ranks' losses, and the gradient that DDP leaves


@dataclass(frozen=True)
class ForeignLoss:
    """A loss as a user names it, `package.module:name`. A class is made with `settings`, a function called with them."""

    name: str
    settings: dict[str, Any]
    call: str = "views"

    def measure(self, views: Tensor, rows: Tensor, dtype: torch.dtype = torch.float64) -> _Measured:
        """Compute it, made anew, for these rows, behind DDP. In float32 if it cannot float64. Raises ConfigError."""
        model, (module, _, name) = DistributedDataParallel(_model().to(dtype)), self.name.partition(":")
        z = model(views[:, rows].flatten(0, 1).to(dtype))
        arguments = {"views": z.chunk(2), "stacked": (z,), "labels": (z, rows.repeat(2))}[self.call]
        try:
            loss = getattr(importlib.import_module(module), name)
            function = loss(**self.settings) if isinstance(loss, type) else partial(loss, **self.settings)
            value = (function.to(dtype) if isinstance(function, nn.Module) else function)(*arguments)
            value.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        except Exception as error:  # of others' code
            if dtype is torch.float64 and re.search("float|double|dtype", str(error), re.IGNORECASE):
                return self.measure(views, rows, torch.float32)
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(f"--loss {self.name}: {crash_summary(error)} ({last.filename}:{last.lineno})") from error
        dist.all_reduce(mean := value.detach().double())
        return float(mean) / dist.get_world_size(), gradient


@dataclass(frozen=True)
class _Form:
    """A loss that is known here. `unit`: it normalises its rows. `carries`: the columns with a gradient, all, own or none."""

    name: str
    unit: bool
    carries: str
    temperature: float = 1.0

    def measure(self, views: Tensor, size: int = 1, factor: float = 1.0) -> _Measured:
        """Compute it by definition, times `factor`, as `size` ranks do."""
        model = _model()
        z = model(views)
        z, value = F.normalize(z, dim=2) if self.unit else z, z.new_zeros(())
        for rows in torch.arange(z.shape[1]).chunk(size):
            columns = z if self.carries == "all" else z.detach().clone()
            if self.carries == "own":
                columns[:, rows] = z[:, rows]
            value = value + factor / size * contrast(z[:, rows], columns, rows, self.temperature, _FORMS[self.name])
        gradient = torch.autograd.grad(value, list(model.parameters()))
        return float(value.detach()), torch.cat([part.flatten() for part in gradient])


def audit_ranks(loss: ForeignLoss) -> tuple[bool, str]:
    """Audit a loss on the first 1, 2, 4 ... of these ranks. Returns (it is right, rank 0's report, else '')."""
    place, timeout = read_place(), timedelta(minutes=1)
    sizes = [2**k for k in range(place.size.bit_length())]
    images, generator = torch.arange(max(_IMAGES, 2 * sizes[-1])), torch.Generator().manual_seed(_SEED)
    views = torch.randn(2, len(images), _PIXELS, generator=generator, dtype=torch.float64).cumsum(0)
    sys.path.append("")  # the current folder, behind all others: a torch.py there is not taken for torch
    store, together, alone = meet(place, 10 * timeout), dict[int, _Measured](), dict[int, Tensor]()
    for size in reversed(sizes):
        if place.rank >= size:
            return True, ""
        world: Any = dist.PrefixStore(f"of {size}", store)  # type: ignore[attr-defined]  # torch's stubs lack it
        dist.init_process_group("gloo", store=world, rank=place.rank, world_size=size, timeout=timeout)
        try:
            together[size] = loss.measure(views, images.chunk(size)[place.rank])
            for parts in sizes[1:] if size == 1 else []:
                alone[parts] = torch.stack([loss.measure(views, rows)[1] for rows in images.chunk(parts)]).mean(0)
        except ConfigError as error:
            if not store.check(["error"]):  # the others' is that this rank has gone
                store.set("error", str(error))
            raise ConfigError(store.get("error").decode()) from error
        dist.destroy_process_group()
    details, findings = _judge(loss, views, dict(sorted(together.items())), alone)
    return not failed(findings), f"{details}\n\n{table(findings)}"


def _model() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(_SEED)
        return nn.Sequential(nn.Linear(_PIXELS, 32), nn.Tanh(), nn.Linear(32, _DIM)).double()


def _fit(views: Tensor, gradient: Tensor) -> _Form | None:
    """Find the loss that has this gradient in one process. Up to a factor, and with its temperature."""

    def misfit(form: _Form) -> float:
        return _distance(form.measure(views)[1], gradient)

    for form in [_Form(name, unit, carries) for name in _FORMS for unit in (True, False) for carries in ("all", "none")]:
        for spread in [100**0.2**k for k in range(12)]:  # 13 temperatures around the best so far, ever nearer to it
            temperatures = np.geomspace(form.temperature / spread, form.temperature * spread, 13).tolist()
            form = min((replace(form, temperature=t) for t in temperatures), key=misfit)
        if misfit(form) < _SAME:
            return form
    return None


def _judge(
    loss: ForeignLoss, views: Tensor, together: dict[int, _Measured], alone: dict[int, Tensor]
) -> tuple[str, list[Finding]]:
    """Compare what each number of ranks gives with one process's. Returns (table, findings)."""
    (value, gradient), factor = together[1], 1.0
    given = ", ".join(f"{key}={setting}" for key, setting in loss.settings.items())
    rows = [
        f"{loss.name}({given}), called {len(together) + sum(alone)} times by rank 0 with {loss.call}: {views.shape[1]} images,"
        f" {str(gradient.dtype).removeprefix('torch.')} [n, {_DIM}] of a small model under DDP, seed {_SEED}, gloo",
        f"{'processes':>9s}{'loss':>11s}{'scale':>10s}{'cosine':>12s}{'relative error':>16s}  against one process",
    ]
    if (form := _fit(views, gradient)) is not None:
        factor = float(gradient.norm() / form.measure(views)[1].norm())
        value, gradient = replace(form, carries="all").measure(views, factor=factor)
    findings = [_name(form, factor, loss.settings.get("temperature"))]
    for size, (mean, theirs) in together.items():
        candidates = {"": gradient} | ({"local": alone[size]} if size in alone else {})
        if form is not None:
            candidates |= {fault: replace(form, carries=fault).measure(views, size, factor)[1] for fault in ("own", "none")}
        ratio = mean / (value or math.nan)
        rows.append(f"{size:9d}{ratio:11.6f}{compared(theirs, gradient)}")
        findings.append(_explain(size, ratio, theirs, candidates))
    return "\n".join(rows), findings


def _name(form: _Form | None, factor: float, temperature: Any) -> Finding:
    """Say which loss it is in one process."""
    if form is None:
        line = "in one process it is no loss that is known here: more processes are compared with one, by fewer known faults"
        return Finding("loss", "warning", line)
    times = "" if math.isclose(factor, 1, rel_tol=1e-3) else f"{factor:.4g} times "
    line = f"in one process it is {times}{form.name}, temperature {form.temperature:.4g}"
    if isinstance(temperature, int | float) and not math.isclose(form.temperature, temperature, rel_tol=1e-3):
        return Finding("loss", "failure", f"{line}, not {temperature:g}", "divide the similarities by the temperature")
    if not _FORMS[form.name]:
        return Finding("loss", "failure", line, "mask the similarity of each anchor with itself")
    warned = "" if form.unit else ", of rows that are not normalised"
    return Finding("loss", "warning" if warned else "ok", line + warned, "normalise z before it" if warned else "")


def _explain(size: int, value: float, gradient: Tensor, candidates: dict[str, Tensor]) -> Finding:
    """Say what the gradient of `size` ranks is. `candidates`: one process's, by '', and those of faults."""
    distance, fault = min((_distance(gradient, other), name) for name, other in candidates.items())
    scale, ranks = float(gradient.norm() / candidates[fault].norm()), f"{size} process{'es' * (size > 1)}: "
    if not distance < _SAME:
        return Finding("loss", "failure", f"{ranks}another gradient, and of none of the known faults")
    sizes = {float(size): f"{size} times the gradient", 1 / size: f"1/{size} of the gradient", 1.0: ""}
    times = next((text for number, text in sizes.items() if math.isclose(scale, number, rel_tol=1e-3)), f"{scale:.4g} times it")
    what, cure = _FAULTS[fault]
    if fault or times:
        return Finding("loss", "failure", ranks + ", ".join(filter(None, [what, times])), cure)
    differs = "" if math.isclose(value, 1, rel_tol=1e-3) else f"; the loss itself is {value:.4g} times one process's"
    return Finding("loss", "ok", f"{ranks}the gradient of one process{differs}")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one / one.norm() - other / other.norm()).norm().nan_to_num(math.inf))  # nan: of a gradient of zeros
