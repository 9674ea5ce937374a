"""`simclr-dist check --loss`: losses that are right, and each known fault, are told apart on real ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ranks
from forkserver import completed
from simclr_dist.cli.main import main
from simclr_dist.method.distributed import all_gather, world_size
from simclr_dist.method.loss import NTXentLoss, nt_xent_reference
from simclr_dist.preflight.check.gradient import contrast

NAME = __name__


class _Summed(torch.autograd.Function):
    """A gather whose backward sums over the ranks."""

    @staticmethod
    def forward(_: Any, z: Tensor) -> Tensor:
        return all_gather(z)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient := gradient.contiguous())
        return gradient[dist.get_rank()]


class Gathering(nn.Module):
    """NT-Xent of the own anchors. `how` the gathered rows get their gradient is where implementations differ."""

    def __init__(self, temperature: float = 0.1, how: str = "summed", left_out: str = "itself") -> None:
        super().__init__()
        self.temperature, self.how, self.left_out = temperature, how, left_out

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        z = F.normalize(torch.stack([z_a, z_b]), dim=2)
        gathered = _Summed.apply(z) if self.how == "summed" else all_gather(z.detach()).clone()
        if self.how in ("own", "whole"):
            gathered[dist.get_rank()] = z
        columns = gathered.transpose(0, 1).flatten(1, 2)
        images = torch.arange(columns.shape[1])
        if self.how == "whole":  # every rank computes the whole batch's loss
            return contrast(columns, columns, images, self.temperature, self.left_out)
        rows = images.chunk(dist.get_world_size())[dist.get_rank()]
        return contrast(z, columns, rows, self.temperature, self.left_out)


def whole_with_factor(z_a: Tensor, z_b: Tensor) -> Tensor:
    return world_size() * Gathering(how="whole")(z_a, z_b)


def times_ranks(z_a: Tensor, z_b: Tensor) -> Tensor:
    return world_size() * NTXentLoss()(z_a, z_b)


def weighted(z_a: Tensor, z_b: Tensor) -> Tensor:
    """A fault that nobody has named."""
    return (1 + dist.get_rank()) * Gathering()(z_a, z_b)


def zero(z_a: Tensor, z_b: Tensor) -> Tensor:
    return 0 * NTXentLoss()(z_a, z_b)


def local(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    return nt_xent_reference(z_a, z_b, temperature)


def multiplied(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    return NTXentLoss(1 / temperature)(z_a, z_b)


def summed_views(z: Tensor) -> Tensor:
    return 2 * NTXentLoss(0.2)(*z.chunk(2))


def unnormalised(z_a: Tensor, z_b: Tensor) -> Tensor:
    z = torch.stack([z_a, z_b])
    return contrast(z, z, torch.arange(len(z_a)), 0.5, "itself")


def float32_alone(z_a: Tensor, z_b: Tensor) -> Tensor:
    if z_a.dtype == torch.float64:
        raise TypeError("no kernel for float64")
    return NTXentLoss()(z_a, z_b)


def by_labels(z: Tensor, labels: Tensor) -> Tensor:
    """The labels are images' numbers: the same for both views, and no other on another rank."""
    assert torch.equal(*labels.chunk(2))
    everywhere = all_gather(labels.chunk(2)[0]).flatten()
    assert everywhere.unique().numel() == everywhere.numel()
    return NTXentLoss()(*z.chunk(2))


def variances(z_a: Tensor, z_b: Tensor) -> Tensor:
    """No contrastive loss at all, with statistics of the own rank."""
    return (z_a - z_b).square().mean() + sum(F.relu(1 - z.std(0)).mean() for z in (z_a, z_b))


def fails_on_rank_1(z_a: Tensor, z_b: Tensor) -> Tensor:
    if dist.get_rank() == 1:
        raise IndexError("Target 12 is out of bounds.")
    return NTXentLoss()(z_a, z_b)


def without_gradient(z_a: Tensor, _: Tensor) -> Tensor:
    return z_a.detach().sum()


RIGHT = "the gradient of one process"
LOCAL, OWN = "negatives of the own rank only", "no gradient through the other ranks' embeddings"
OTHER = "another gradient, and of none of the known faults"
NONE = "no gradient through the gathered embeddings"


def _audit(size: int, loss: str, *options: str) -> tuple[set[int], str, list[str]]:
    """Exit codes, all that was said, and what the lines say of the loss, and of each number of processes."""
    codes, out, error = ranks.commands(main, ["check", "--loss", loss, *options], size)
    return (
        set(codes),
        out + error,
        re.findall(r"^(?:ok|warning|failure) +loss +(?:\d+ process(?:es)?: )?(.*)$", out, re.MULTILINE),
    )


@pytest.mark.parametrize(
    ("size", "loss", "options", "first", "later"),
    [
        (4, "simclr_dist:NTXentLoss", ["--loss-args", "temperature=0.2"], "NT-Xent, temperature 0.2", [RIGHT, RIGHT, RIGHT]),
        (3, f"{NAME}:Gathering", [], "NT-Xent, temperature 0.1", [RIGHT, RIGHT]),
        (4, f"{NAME}:local", ["--loss-args", "temperature=0.5"], "NT-Xent, temperature 0.5", [RIGHT, LOCAL, LOCAL]),
        (2, f"{NAME}:Gathering", ["--loss-args", "how=none"], "NT-Xent, temperature 0.1", [NONE, NONE]),
        (4, f"{NAME}:Gathering", ["--loss-args", "how=own"], "NT-Xent, temperature 0.1", [RIGHT, OWN, OWN]),
        (
            *(4, f"{NAME}:Gathering", ["--loss-args", "how=whole"], "NT-Xent, temperature 0.1"),
            [RIGHT, "1/2 of the gradient", "1/4 of the gradient"],
        ),
        (2, f"{NAME}:whole_with_factor", [], "", [RIGHT, f"{RIGHT}; the loss itself is 2 times one process's"]),
        (2, f"{NAME}:times_ranks", [], "", [RIGHT, "2 times the gradient"]),
        (
            *(1, f"{NAME}:multiplied", ["--loss-args", "temperature=0.2"]),
            *("NT-Xent, temperature 5, not 0.2", [RIGHT]),
        ),
        (2, f"{NAME}:summed_views", ["--loss-call", "stacked"], "2 times NT-Xent, temperature 0.2", [RIGHT, RIGHT]),
        (1, f"{NAME}:unnormalised", [], "NT-Xent, temperature 0.5, of rows that are not normalised", [RIGHT]),
        (2, f"{NAME}:float32_alone", [], "NT-Xent, temperature 0.1", [RIGHT, RIGHT]),
        (2, f"{NAME}:by_labels", ["--loss-call", "labels"], "NT-Xent, temperature 0.1", [RIGHT, RIGHT]),
        (1, f"{NAME}:Gathering", ["--loss-args", "left_out=''"], "NT-Xent with the anchor itself in its denominator", [RIGHT]),
        (2, f"{NAME}:Gathering", ["--loss-args", "left_out=both,temperature=0.3"], "without the positive", [RIGHT, RIGHT]),
        (2, f"{NAME}:Gathering", ["--loss-args", "left_out=view,how=none"], "each view among the other's", [NONE, NONE]),
        (2, f"{NAME}:weighted", [], "NT-Xent, temperature 0.1", [RIGHT, OTHER]),
        (1, f"{NAME}:zero", [], "no loss that is known here", [OTHER]),
        (2, f"{NAME}:variances", [], "no loss that is known here", [RIGHT, LOCAL]),
    ],
)
def test_what_a_loss_does(size: int, loss: str, options: list[str], first: str, later: list[str]) -> None:
    codes, said, [name, *lines] = _audit(size, loss, *options)
    assert first in name, said
    assert lines == later, said
    failed = {1} if " not 0.2" in name or "itself in its" in name or any(RIGHT not in line for line in lines) else {0}
    assert codes - {0} == failed - {0}, said
    assert ("float32 [n, 16]" in said) == ("float32" in loss)
    assert "seed 0" in said


def test_the_table_is_of_the_whole_batch() -> None:
    _, said, _ = _audit(2, f"{NAME}:Gathering", "--loss-args", "how=whole")
    assert "called 4 times by rank 0 with views: 32 images" in said
    one, two = (line.split() for line in said.splitlines() if re.match(r" +[12] ", line))
    assert [*one[:4]] == ["1", "1.000000", "1.000000", "1.00000000"]
    assert [*two[:4]] == ["2", "1.000000", "0.500000", "1.00000000"]


@pytest.mark.parametrize("left_out", ["itself", "both"])
def test_rows_by_definition_are_the_reference(left_out: str) -> None:
    z_a, z_b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = F.normalize(torch.stack([z_a, z_b]), dim=2)
    shares = [contrast(z[:, rows], z, rows, 0.2, left_out) for rows in torch.arange(6).chunk(3)]
    expected = nt_xent_reference(z_a, z_b, 0.2, decoupled=left_out == "both")
    torch.testing.assert_close(torch.stack(shares).mean(), expected)


@pytest.mark.parametrize(
    ("size", "options", "line"),
    [
        (2, [f"{NAME}:fails_on_rank_1"], f"--loss {NAME}:fails_on_rank_1: IndexError: Target 12 is out of bounds. ("),
        (2, [f"{NAME}:nothing"], f"--loss {NAME}:nothing: AttributeError: module '{NAME}' has no attribute 'nothing'"),
        (1, ["no_such.module:Loss"], "--loss no_such.module:Loss: ModuleNotFoundError: No module named 'no_such'"),
        (1, [f"{NAME}:local"], "TypeError: local() missing 1 required positional argument: 'temperature'"),
        (1, [f"{NAME}:without_gradient"], "RuntimeError: element 0 of tensors does not require grad"),
        (1, ["lightly.loss.NTXentLoss"], "--loss lightly.loss.NTXentLoss: is not MODULE:NAME, such as"),
        (1, ["a:B", "--loss-args", "temperature"], "--loss-args temperature: is not NAME=VALUE,NAME=VALUE"),
        (1, ["a:B", "--loss-args", "temperature={"], "--loss-args: not valid YAML: "),
        (1, ["a:B", "--only", "gradient"], "--loss: looks at that loss alone; leave CONFIG and --only out"),
    ],
)
def test_what_cannot_be_checked_is_one_line(size: int, options: list[str], line: str) -> None:
    codes, _, error = ranks.commands(main, ["check", "--loss", *options], size)
    assert codes[0] == 2, error
    ours = [said for said in error.splitlines() if said.startswith("simclr-dist: ")]
    assert len(ours) == 1, error
    assert line in ours[0]


@pytest.mark.parametrize("option", ["--loss-args=temperature=0.1", "--loss-call=views"])
def test_options_without_a_loss(option: str) -> None:
    done = completed(main, ["check", option])
    assert done.returncode == 2
    assert done.stderr == "simclr-dist: --loss-args and --loss-call: are for a --loss MODULE:NAME, which is missing\n"


@pytest.mark.slow
def test_as_it_is_typed_with_a_file_of_this_folder(tmp_path: Path) -> None:
    """The file's name is a module's of torch's too, which must not be hidden by it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('not this')\n")
    (tmp_path / "mine.py").write_text("from simclr_dist.method.loss import nt_xent_reference as loss\n")
    done = completed(main, ["check", "--loss", "mine:loss", "--loss-args", "temperature=0.1", "--processes", "2"], tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"2 processes: {LOCAL}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["mine.py", "torch.py"]
