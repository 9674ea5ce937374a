"""The blog's downstream MLP, and for every trained probe: the test rows are not touched before the last step."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch.optim.optimizer import register_optimizer_step_post_hook

from evaluated import scored
from simclr_dist.evaluate.protocols.linear import linear_probe
from simclr_dist.evaluate.protocols.mlp import classifier, mlp_probe
from simclr_dist.evaluate.protocols.scores import score, spread
from simclr_dist.evaluate.protocols.sgd import sgd_probe

Probe = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, Any]]]

PROBES: dict[str, Probe] = {
    "linear": lambda h, y, test_h: scored(linear_probe, (h, y), test_h, classes=4),
    "sgd": lambda h, y, test_h: scored(sgd_probe, (lambda _: (h, y),), test_h, classes=4, epochs=2, batch_size=100),
    "mlp": lambda h, y, test_h: scored(mlp_probe, (h, y), test_h, classes=4, epochs=2, seeds=(0, 1)),
}


def blobs(n: int, seed: int, *, d: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(n, d, generator=generator), labels


class Watched(torch.Tensor):
    """A tensor that writes down every use of it, and of what is made of it."""

    log: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.log.append("test")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def log() -> Iterator[list[str]]:
    Watched.log = []
    handle = register_optimizer_step_post_hook(lambda *_: Watched.log.append("step"))
    yield Watched.log
    handle.remove()


@pytest.mark.parametrize("name", PROBES)
def test_the_test_rows_are_touched_after_the_last_step(name: str, log: list[str]) -> None:
    train_h, train_y = blobs(300, 0)
    test_h = blobs(50, 1)[0].as_subclass(Watched)
    log.clear()
    PROBES[name](train_h, train_y, test_h)
    steps = log.count("step")
    assert steps >= 4
    assert log[:steps] == ["step"] * steps
    assert log[steps:] == ["test"] * (len(log) - steps)
    assert len(log) > steps


@pytest.mark.parametrize("name", PROBES)
def test_other_test_rows_change_nothing_of_the_fit(name: str) -> None:
    train_h, train_y = blobs(300, 0)
    test_h, _ = blobs(50, 1)
    logits, info = PROBES[name](train_h, train_y, test_h)
    fewer, same = PROBES[name](train_h, train_y, torch.cat([test_h[:5], torch.full((1, 12), 1e9)]))
    assert info == same
    torch.testing.assert_close(fewer[..., :5, :], logits[..., :5, :])


def test_the_layers_are_the_blogs() -> None:
    kinds = [type(layer).__name__ for layer in classifier(512, 10)]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    shapes = [tuple(parameter.shape) for parameter in classifier(512, 10).parameters()]
    assert shapes == [(128, 512), (128,), (128, 128), (128,), (10, 128), (10,)]
    assert {layer.p for layer in classifier(512, 10) if isinstance(layer, torch.nn.Dropout)} == {0.2}


def test_the_training_is_the_blogs_with_gradients_cleared() -> None:
    h, y = blobs(50, 0)
    logits, info = scored(mlp_probe, (h, y), h, classes=4, epochs=3, batch_size=20, seeds=(7,))
    torch.manual_seed(7)
    network = classifier(12, 4).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    for _ in range(3):
        order = torch.randperm(50)
        for rows in (order[:20], order[20:40], order[40:]):
            network.zero_grad()
            torch.nn.CrossEntropyLoss()(network(h[rows]), y[rows]).backward()
            optimizer.step()
    assert torch.equal(logits[0], network.eval()(h))
    assert info["steps"] == 9


def test_it_learns_and_shuffled_labels_give_chance() -> None:
    train_h, train_y = blobs(1000, 0)
    test_h, test_y = blobs(1000, 1)
    logits, info = scored(mlp_probe, (train_h, train_y), test_h, classes=4, epochs=12, batch_size=16, seeds=(0, 1))
    assert (logits.shape, logits.dtype) == ((2, 1000, 4), torch.float32)
    runs = [score(one, test_y) for one in logits]
    assert min(run.top1 for run in runs) > 75
    assert 0 < spread(runs)["top1"]["sd"] < 3
    assert len(info["train_top1"]) == 2
    # The test labels are in random order too: rows of a blob share one prediction, and how many of them are right by luck
    # is no binomial number.
    generator = torch.Generator().manual_seed(3)
    shuffled, test_y = train_y[torch.randperm(1000, generator=generator)], test_y[torch.randperm(1000, generator=generator)]
    control, _ = scored(mlp_probe, (train_h, shuffled), test_h, classes=4, epochs=12, batch_size=16, seeds=(0,))
    low, high = binom.interval(0.999, 1000, 0.25)
    assert low <= int((control[0].argmax(dim=1) == test_y).sum()) <= high


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    h, y = blobs(100, 0)
    state = torch.random.get_rng_state()
    both, info = scored(mlp_probe, (h, y), h, classes=4, epochs=2, seeds=(3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    alone, again = scored(mlp_probe, (h, y), h, classes=4, epochs=2, seeds=(4,))
    assert torch.equal(both[1], alone[0])
    assert info["loss"][1] == again["loss"][0]
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(("epochs", "batch_size", "seeds"), [(0, 1, (0,)), (1, 0, (0,)), (1, 1, ())])
def test_senseless_settings_are_refused(epochs: int, batch_size: int, seeds: tuple[int, ...]) -> None:
    h, y = blobs(10, 0)
    with pytest.raises(ValueError, match="must be at least 1"):
        scored(mlp_probe, (h, y), h, classes=4, epochs=epochs, batch_size=batch_size, seeds=seeds)
    with pytest.raises(ValueError, match="no training rows"):
        scored(mlp_probe, (h[:0], y[:0]), h, classes=4)
