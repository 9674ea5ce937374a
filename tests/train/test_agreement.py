"""Ranks agree: to stop, one step after one of them was asked to; and that they hold the same numbers, to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
from simclr_dist.config.settings import Config, DataConfig, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import RanksDifferError
from simclr_dist.train.agreement import StopAgreement, any_stop_signal, check_ranks_agree
from simclr_dist.train.learner import build_learner
from simclr_dist.train.loop import training_step
from simclr_dist.train.state import learned_tensors

CPU = torch.device("cpu")


# To stop


def words(world: World, said: list[list[int]]) -> dict[str, Any]:
    """What this rank hears when rank r says said[r][step] at each step."""
    agreement = StopAgreement(CPU)
    before = any_stop_signal(said[world.rank][0])
    heard = [agreement.exchange(word) for word in said[world.rank]]
    return {"before": before, "heard": heard, "last": agreement.finish(), "nothing": agreement.finish()}


def test_a_word_is_heard_by_all_one_step_later() -> None:
    said = [[0, 0, 0, 12, 12, 0], [0, 0, 10, 10, 15, 0], [0, 0, 0, 0, 0, 9]]
    for result in ranks.run(words, 3, said):
        assert result == {"before": 0, "heard": [0, 0, 0, 10, 12, 15], "last": 9, "nothing": 0}


def test_before_the_first_step_it_is_heard_at_once() -> None:
    for result in ranks.run(words, 2, [[0], [15]]):
        assert result == {"before": 15, "heard": [0], "last": 15, "nothing": 0}


def test_alone_it_is_heard_at_once() -> None:
    agreement = StopAgreement(CPU)
    assert [any_stop_signal(15), agreement.exchange(0), agreement.exchange(10), agreement.finish()] == [15, 0, 10, 0]


# On their numbers


def samples() -> dict[str, Tensor]:
    """Every kind of tensor, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 5, 5, generator=generator)
    whole = torch.randint(-(2**62), 2**62, (7,), generator=generator)
    return {
        "float32": weight,
        "channels_last": weight.to(memory_format=torch.channels_last),
        "transposed": weight[0, 0].t(),
        "every other": weight.flatten()[::2],
        "float64": weight.double(),
        "float16": weight.half(),
        "bfloat16": weight.bfloat16(),
        "int64": whole,
        "int32": whole.int(),
        "uint8": whole.to(torch.uint8),
        "bool": whole > 0,
        "no dimension": torch.tensor(3),
        "one number": torch.tensor([0.5]),
        "not a number": torch.tensor([torch.nan, torch.inf, -0.0]),
        "empty": torch.empty(0, 3),
        "a million": torch.zeros(1_000_000),
    }


def flip(tensor: Tensor, element: int, bit: int) -> Tensor:
    """A copy of the same layout with one bit of one number changed."""
    changed = tensor.clone()
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(element % tensor.numel()), tensor.shape))
    number = tensor[place].reshape(1)
    if tensor.dtype == torch.bool:
        changed[place] = ~number[0]
        return changed
    integers = number.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bit %= 8 * tensor.element_size()
    mask = torch.tensor(1 << bit if bit < 63 else -(2**63), dtype=torch.int64).to(integers.dtype)
    changed[place] = (integers ^ mask).view(tensor.dtype)[0]
    return changed


def told(tensors: dict[str, Tensor], step: int = 7) -> str:
    """What the check says; empty when the ranks agree."""
    try:
        check_ranks_agree(tensors, step)
    except RanksDifferError as error:
        return str(error)
    return ""


def flips_in_every_kind(world: World) -> list[tuple[str, int | None, str]]:
    """(tensor, rank that has another one, what is said)."""
    found: list[tuple[str, int | None, str]] = [("none", None, told(samples()))]
    for number, (name, tensor) in enumerate(samples().items()):
        for element, bit in ((0, 0), (13, 9), (-1, 31), (5, 63)):
            if tensor.numel() and not (name == "not a number" and bit != 0):  # other bits of a NaN do not survive a copy
                changed = flip(tensor, element, bit) if world.rank == number % 3 else tensor
                found.append((name, number % 3, told(samples() | {name: changed})))
    two = torch.arange(10.0)
    swapped = two.flip(0) if world.rank == 1 else two
    found.append(("order", 1, told({"order": swapped})))
    return found


def test_a_flipped_bit_in_any_kind_of_tensor_is_named() -> None:
    results = ranks.run(flips_in_every_kind, 3)
    for rank, found in enumerate(results):
        assert len(found) > 50
        for name, guilty, line in found:
            if guilty is None:
                assert line == ""
            else:
                assert line.startswith(f"step 7: rank {guilty} holds other numbers in {name} than most of the 3 ranks; ")
                assert f"; seen by rank {rank}. " in line


def differences_of_two(world: World) -> str:
    changed = {name: flip(tensor, 0, 1) if tensor.numel() and world.rank == 1 else tensor for name, tensor in samples().items()}
    return told({name: changed[name] for name in ("int64", "float64")})


def test_many_differences_are_counted() -> None:
    for line in ranks.run(differences_of_two, 2):
        assert " holds other numbers in int64 than most of the 2 ranks (2 such differences); " in line


SMALL = Config(
    run_folder="run",
    global_batch_size=12,
    steps=4,
    device="cpu",
    data=DataConfig(shards="shards"),
    views=ViewsConfig(preset="small", image_size=16),
    model=ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=8, projector_dim=4),
    optim=OptimConfig(warmup_steps=1),
)


def flips_in_a_learner(world: World) -> dict[str, str]:
    learner = build_learner(SMALL, world)
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(2):
        views = torch.randn(2, 4, 3, 16, 16, generator=generator)
        training_step(learner, [(views[0], views[1])], SMALL, 0.1)
    found = {"equal": told(learned_tensors(learner))}
    momentum = next(iter(learner.optimizer.state.values()))["momentum_buffer"]
    for name, tensor in {
        "projector.0.weight": learner.model.projector.get_parameter("0.weight"),
        "encoder.bn1.running_var": learner.model.encoder.get_buffer("bn1.running_var"),
        "encoder.bn1.num_batches_tracked": learner.model.encoder.get_buffer("bn1.num_batches_tracked"),
        "optimizer state 0 momentum_buffer": momentum,
    }.items():
        before = tensor.detach().clone()
        with torch.no_grad():
            if world.rank == 2:
                tensor.copy_(flip(tensor.detach(), 1, 0))
            found[name] = told(learned_tensors(learner))
            tensor.copy_(before)
    found["equal again"] = told(learned_tensors(learner))
    return found


@pytest.mark.slow
def test_a_flipped_bit_in_parameter_buffer_or_momentum_is_named() -> None:
    for found in ranks.run(flips_in_a_learner, 3):
        assert found.pop("equal") == found.pop("equal again") == ""
        assert len(found) == 4
        for name, line in found.items():
            assert line.startswith(f"step 7: rank 2 holds other numbers in {name} than most of the 3 ranks; ")


def test_alone_there_is_nobody_to_differ_from() -> None:
    check_ranks_agree(samples(), 1)
