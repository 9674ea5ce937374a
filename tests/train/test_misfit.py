"""A whole checkpoint that is not of this run is refused, and nothing of it is taken."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training_runs as runs
from simclr_dist.config.load import load_config
from simclr_dist.config.settings import Config
from simclr_dist.method.distributed import process_group
from simclr_dist.run import checkpoint
from simclr_dist.system.errors import ConfigError, DataError
from simclr_dist.train.learner import Learner, build_learner
from simclr_dist.train.state import full_state, resume

DIGEST = "of these images"
WEIGHT = "projector.0.weight"
State = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Learner, State]:
    """A learner of a narrow network after a step of LARS, and its state."""
    folder = tmp_path_factory.mktemp("misfit")
    config = load_config(runs.write_config(folder, folder / "shards"))
    with process_group("cpu", 1.0) as world:
        learner = build_learner(config, world)
        for parameter in learner.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()
        state = full_state(learner, config, world, 5, {"7": "torn"}, DIGEST)
    return config, learner, copy.deepcopy({**state, "format": checkpoint.FORMAT})


def resumed(run: tuple[Config, Learner, State], state: State, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, str]]:
    config, learner, _ = run
    monkeypatch.setattr(checkpoint, "load_newest", lambda *_, **__: state)
    with process_group("cpu", 1.0) as world:
        return resume(learner, config, world, 6, DIGEST)


def momentum(state: State) -> State:
    return next(iter(state["optimizer"]["state"].values()))


def changed(state: State, *keys: Any, to: Any) -> None:
    *path, last = keys
    for key in path:
        state = state[key]
    state[last] = to


MISFITS: dict[str, Callable[[State], object]] = {
    "model missing": lambda state: state.pop("model"),
    "optimizer missing": lambda state: state.pop("optimizer"),
    "counters missing": lambda state: state.pop("counters"),
    "init missing": lambda state: state.pop("init"),
    "bad_samples missing": lambda state: state.pop("bad_samples"),
    "environment missing": lambda state: state.pop("environment"),
    "model a list": lambda state: changed(state, "model", to=[1]),
    "tensor missing": lambda state: state["model"].pop(WEIGHT),
    "tensor too many": lambda state: changed(state, "model", "other", to=torch.ones(1)),
    "tensor of another shape": lambda state: changed(state, "model", WEIGHT, to=torch.ones(3, 2)),
    "tensor of another dtype": lambda state: changed(state, "model", WEIGHT, to=state["model"][WEIGHT].double()),
    "no tensor": lambda state: changed(state, "model", WEIGHT, to="x"),
    "NaN": lambda state: state["model"][WEIGHT].view(-1)[3].fill_(torch.nan),
    "infinity": lambda state: state["model"][WEIGHT].view(-1)[3].fill_(torch.inf),
    "momentum of another shape": lambda state: changed(momentum(state), next(iter(momentum(state))), to=torch.ones(3)),
    "momentum NaN": lambda state: next(iter(momentum(state).values())).fill_(torch.nan),
    "groups missing": lambda state: changed(state, "optimizer", "param_groups", to=[]),
    "parameters missing": lambda state: state["optimizer"]["param_groups"][0]["params"].pop(),
    "setting missing": lambda state: state["optimizer"]["param_groups"][0].pop("momentum"),
    "optimizer without state": lambda state: state["optimizer"].pop("state"),
    "counter a text": lambda state: changed(state, "counters", "skipped", to="x"),
    "counter negative": lambda state: changed(state, "counters", "skipped", to=-1),
    "counter huge": lambda state: changed(state, "counters", "skipped", to=10**30),
    "bad sample a number": lambda state: changed(state, "bad_samples", "8", to=1),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(
    run: tuple[Config, Learner, State], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, learner, state = run
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    state = copy.deepcopy(state)
    MISFITS[name](state)
    path = Path(config.run_folder, "checkpoints/step-00000005.pt")
    with pytest.raises(DataError, match=r"\); move it and its \.json elsewhere") as caught:
        resumed(run, state, monkeypatch)
    assert str(caught.value).startswith(f"{path}: does not fit this run (")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())


def test_what_fits_is_taken(run: tuple[Config, Learner, State], monkeypatch: pytest.MonkeyPatch) -> None:
    _, learner, state = run
    state = copy.deepcopy(state)
    state["counters"] = {"clipped": 3}  # of an older version
    state["environment"] = {"python": "3.1", "gone": 1}
    assert resumed(run, state, monkeypatch) == (5, {"7": "torn"})
    assert {name: int(counter) for name, counter in learner.counters.items() if counter} == {"clipped": 3}


def test_the_checkpoint_knows_its_images(run: tuple[Config, Learner, State], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when env.json was lost."""
    with pytest.raises(ConfigError, match=r"^data\.shards: .* holds other images than the run began with"):
        resumed(run, {**run[2], "data_digest": "other"}, monkeypatch)
    assert resumed(run, {**run[2], "data_digest": None}, monkeypatch)[0] == 5
