"""Two nodes without a scheduler, and all that can go wrong between them: the run goes on, or ends on both with a word."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

import training_runs
from network.namespaces import Network, why_not
from network.training import INTERVAL, NODES, PORT, TIMEOUT_SECONDS, Run
from simclr_dist.system.errors import PREEMPTED
from slurm.training import alone, assert_same

pytestmark = pytest.mark.slow

STEPS = 45
WAIT_MINUTES = 0.6  # for the other node, where it is waited for in vain


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for all runs of this file."""
    if reason := why_not():
        pytest.skip(reason)
    return training_runs.make_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[dict[str, Future[Run]]]:
    """The long ones, by name, each on a network of its own: they wait more than they work."""

    def play(scenario: Any, folder: Path) -> Run:
        # By the order of addresses n1's rank is 1 beside n2, and 0 alone.
        with Network(("n2", "n1") if scenario is elastic else NODES) as network:
            run: Run = scenario(network, folder, shards)
            return run

    with ThreadPoolExecutor() as pool:
        yield {
            each.__name__: pool.submit(play, each, tmp_path_factory.mktemp(each.__name__)) for each in (kills, cable, elastic)
        }


@pytest.fixture(scope="module")
def undisturbed(at_once: Any, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    """The last checkpoint of the run that nothing happens to."""
    return alone(tmp_path_factory.mktemp("alone"), shards, STEPS)


def kills(network: Network, folder: Path, shards: Path) -> Run:
    """A rank, torchrun, the command with all that it has started, a node, and the node that hosts the rendezvous."""
    run = Run(network, folder, shards, steps=STEPS)
    run.launch(*NODES)
    run.started(1)
    for fault, node in (("rank", "n2"), ("agent", "n1"), ("launcher", "n2"), ("node", "n2"), ("node", "n1")):
        print(fault, node, run.survive(fault, node))
    assert run.ended("done").codes == {"n1": 0, "n2": 0}, run.logs()
    for node in NODES:
        assert run.processes(node, "simclr_dist") == []
    return run


def test_whatever_is_killed_comes_back_and_nothing_shows(at_once: dict[str, Future[Run]], undisturbed: dict[str, Any]) -> None:
    run = at_once["kills"].result()
    assert [start["world_size"] for start in run.events("start")] == [2] * 6
    assert_same(training_runs.checkpoint(run.run, STEPS), undisturbed)


def cable(network: Network, folder: Path, shards: Path) -> Run:
    """Pulled and plugged in again; then a stop on one node, and the same lines; then the cable pulled for good."""
    run = Run(network, folder, shards, steps=1000)
    run.launch(*NODES)
    run.started(1)
    print("cable pulled and plugged in", run.survive("cable", "n2"))

    end = run.stop("n2")
    print("stopped", end)
    assert end.codes == {"n1": PREEMPTED, "n2": PREEMPTED}, run.logs()
    assert max(end.seconds.values()) < 30, "torchrun alone would wait 300 s for the other node"
    assert run.events("stop")[-1]["step"] == training_runs.last_step(run.run)

    run.launch(*NODES, options=("--first_step_timeout_minutes", str(WAIT_MINUTES)))
    run.started(3)
    assert run.events("start")[-1]["steps_lost"] == 0
    end = run.cut_for_good("n2", 60 * WAIT_MINUTES + 60)
    print("cable pulled for good", end)
    assert end.noticed < TIMEOUT_SECONDS + 5
    assert end.codes == {"n1": 1, "n2": 1}, run.logs()
    return run


def test_a_cable_pulled_for_good_ends_both_and_nobody_writes(at_once: dict[str, Future[Run]]) -> None:
    """Behind a cable that was plugged in again, and a stop on one node."""
    run = at_once["cable"].result()
    for node in NODES:
        said = run.output(node).splitlines()[-1]
        assert said.startswith(f"simclr-dist: --nnodes 2: the machines did not come together at n1:{PORT} within 0.6 min"), said
    starts = run.events("start")
    assert len(list((run.run / "starts").iterdir())) == len(starts) == 3
    assert {start["host"] for start in starts} == {"n1"}
    newest = max((run.run / "checkpoints").glob("step-*.pt"))
    assert newest.stat().st_mtime < run.events("stop")[-1]["time"]


def elastic(network: Network, folder: Path, shards: Path) -> Run:
    """Two nodes, one, two again, and one."""
    run = Run(network, folder, shards, steps=1000, nnodes="1:2")
    run.launch(*NODES)
    run.started(1)
    run.progress()
    began = time.monotonic()
    network.kill("n2")
    run.started(2)
    print("alone after", time.monotonic() - began)
    began = time.monotonic()
    network.boot("n2")
    run.launch("n2")
    run.started(3)
    print("two again after", time.monotonic() - began)
    run.progress()
    network.kill("n2")
    run.started(4)
    del run.launchers["n2"]
    assert run.stop("n1").codes == {"n1": PREEMPTED}, run.logs()
    return run


def test_one_node_less_and_one_more(at_once: dict[str, Future[Run]]) -> None:
    """The global batch stays, and with it the number of negatives; the node that comes back costs no step."""
    run = at_once["elastic"].result()
    starts = run.events("start")
    assert [start["world_size"] for start in starts] == [2, 1, 2, 1], run.logs()
    assert starts[1]["steps_lost"] <= INTERVAL
    assert starts[2]["steps_lost"] == 0
    assert [entry["why"] for entry in run.events("restart")] == ["ended without a word: killed, or cut off"] * 2, (
        "the rank that was stopped for the join has nothing to do with it"
    )
    assert {line["loss/negatives_an_anchor"] for line in training_runs.metrics(run.run)} == {2 * (24 - 1)}


def test_a_stop_before_the_other_node_has_come(network: Network, tmp_path: Path, shards: Path) -> None:
    """While torchrun imports torch, and while it waits at the rendezvous."""
    run = Run(network, tmp_path, shards, steps=STEPS)
    for node, ready in (("n2", lambda: bool(run.agents("n2"))), ("n1", lambda: _listens(run.launchers["n1"].command_pid))):
        run.launch(node)
        training_runs.until(ready, 60)
        run.launchers[node].send_signal(SIGTERM)
        assert run.launchers.pop(node).wait(60) == PREEMPTED, run.logs()
        assert run.processes(node, "simclr_dist") == []
    assert not run.run.exists()


def test_a_number_of_nodes_that_the_batch_does_not_fit(network: Network, tmp_path: Path, shards: Path) -> None:
    """Refused on each node, before anything starts."""
    run = Run(network, tmp_path, shards, steps=STEPS, nnodes="1:3", global_batch_size=64)
    run.launch(*NODES)
    for node in NODES:
        assert run.launchers[node].wait(60) == 2
        line = "simclr-dist: global_batch_size: 64 is not divided by 3 processes x 1 micro_batches; 63 would be\n"
        assert run.output(node) == line
    assert not run.run.exists()


def _listens(process: int) -> bool:
    """Whether somebody in the network that a process lives in listens on the rendezvous' port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()]
    return any(line[1].endswith(f":{PORT:04X}") and line[3] == "0A" for line in lines)
