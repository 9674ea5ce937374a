"""How often does a fault cost more than it may? Repeats what tests/faults does once; prints a row of a table for each fault.

python benchmarks/faults.py                         (every row, about an hour on 2 cores)
python benchmarks/faults.py --rows saves,kills-3 --times 5 --seed 7

Ends with 1 when a row fails.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.pop(0)  # this folder, where this file has the name of the tests' package
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores, and bits depend on the number of threads

import torch

import training_runs as runs
from faults import killed_saves
from faults.commands import Command, running, simclr_dist
from faults.seeded_kills import killed_again_and_again
from simclr_dist.run.claim import heartbeat
from simclr_dist.system import signals
from simclr_dist.system.errors import PREEMPTED

TESTS = Path(__file__).parents[1] / "tests"
EVERY = 5  # steps between checkpoints


class Place(NamedTuple):
    """Where a row runs."""

    folder: Path
    shards: Path
    times: int
    seed: int


class Row(NamedTuple):
    """A fault, what it may cost, how to find out, and how often."""

    fault: str
    must: str
    find: Callable[[Place], str]
    times: int


def saves(here: Place) -> str:
    """In a process of its own, which must have no threads."""
    command = [sys.executable, killed_saves.__file__, str(here.folder / "checkpoints"), str(here.times), str(here.seed)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert (found["kills"], found["unloadable"], found["lost"]) == (here.times, 0, 0), found
    return f"0 unloadable, 0 lost of {found['saves']} finished ({found['cut_off']} kills came within a save)"


def kills(world_size: int) -> Callable[[Place], str]:
    """Of a whole run."""

    def find(here: Place) -> str:
        steps = 10 * here.times + 40
        straight = _straight(here, world_size, steps)
        killed = here.folder / "killed"
        runs.write_config(killed, here.shards, steps=steps)
        found = killed_again_and_again(killed, world_size, kills=here.times, seed=here.seed)
        assert found["kills"] == here.times, f"the run was done after {found['kills']} kills"
        assert found["most_lost"] <= EVERY, found
        runs.assert_same_run(killed / "run", straight, steps)
        return f"the same bits after {steps} steps; at most {found['most_lost']} steps lost, {EVERY} between checkpoints"

    return find


def stops(here: Place) -> str:
    """Of the real command, from its first moment on."""
    moments, steps = random.Random(here.seed), 40 * here.times + 40
    straight = _straight(here, 2, steps)
    folder, slowest, unheard = here.folder / "stopped", 0.0, 0
    runs.write_config(folder, here.shards, steps=steps, checkpoint={"every": 10 * steps})
    for _ in range(here.times):
        with running(folder, simclr_dist("train", "config.yaml", "--processes", "2")) as command:
            time.sleep(moments.uniform(0, 12))
            listened, began = runs.listens(command.process.pid), time.monotonic()
            command.process.send_signal(moments.choice(signals.SIGNALS))
            code = command.wait()
            slowest = max(slowest, time.monotonic() - began)
            unheard += not listened
            assert code == PREEMPTED or (not listened and code < 0), f"exit code {code}\n{command.output}"
            runs.until(lambda: not command.alive(), 30)
    # The interval and the seconds of the last start are those of the other run.
    runs.train(folder, 2, "--checkpoint.every", str(EVERY))
    lost = [entry["steps_lost"] for entry in runs.events(folder / "run", "start")]
    assert not any(lost), lost
    runs.assert_same_run(folder / "run", straight, steps)
    early = f"; {unheard} came before Python could listen, and ended it there" if unheard else ""
    return f"0 steps lost, the same bits; at most {slowest:.1f} s from signal to end{early}"


def parts(here: Place) -> str:
    """Of a rank or of torchrun, under the real command."""
    moments, steps = random.Random(here.seed), 40 * here.times + 40
    straight = _straight(here, 2, steps)
    folder = here.folder / "killed"
    runs.write_config(folder, here.shards, steps=steps)
    run, slowest = folder / "run", 0.0
    with running(folder, simclr_dist("train", "config.yaml", "--processes", "2", "--max-restarts", "1")) as command:
        for generation in range(1, here.times + 1):
            _wait_for(command, run, generation, newer_by=moments.randint(EVERY, 2 * EVERY))
            ranks = command.ranks()
            os.kill(moments.choice([ranks[0], ranks[1], *command.agents()]), signal.SIGKILL)
            began = time.monotonic()
            _wait_for(command, run, generation + 1, newer_by=1)
            slowest = max(slowest, time.monotonic() - began)
        assert command.wait(3600) == 0, command.output
    lost = [entry["steps_lost"] for entry in runs.events(run, "start")]
    assert len(lost) == here.times + 1, "one kill, one start"
    assert max(lost) <= EVERY, lost
    runs.assert_same_run(run, straight, steps)
    return f"went on by itself, the same bits; at most {max(lost)} steps lost and {slowest:.0f} s from kill to next step"


def tests(*names: str) -> Callable[[Place], str]:
    """Tests that prove the row, as often."""

    def find(here: Place) -> str:
        for number in range(here.times):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in names)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=TESTS.parent)
            assert done.returncode == 0, f"time {number + 1}: {done.stdout}"
        return done.stdout.splitlines()[-1].strip("= ") + (" each time" if here.times > 1 else "")

    return find


def _straight(here: Place, world_size: int, steps: int) -> Path:
    """The run folder of a run to which nothing happens."""
    folder = here.folder / "straight"
    runs.write_config(folder, here.shards, steps=steps)
    with runs.started(folder, world_size) as ranks:
        assert ranks.wait(3600) == [0] * world_size, ranks.output
    return folder / "run"


def _wait_for(command: Command, run: Path, generation: int, *, newer_by: int) -> None:
    """Until the start of this number has made so many steps."""

    def there() -> bool:
        assert command.process.poll() is None, command.output
        starts = [entry for entry in runs.events(run, "start") if entry["generation"] == generation]
        beat = heartbeat(run)
        return bool(starts) and beat.get("generation") == generation and beat["step"] >= starts[0]["step"] + newer_by

    runs.until(there, 300)


CRASHES, STOPS, DISK = "faults/test_crashes.py::test_", "faults/test_stops.py::test_", "faults/test_full_disk_training.py"
SHARED = "faults/test_shared_memory.py::test_"
LAUNCHED, TRAINED = "slurm/test_launch.py::test_", "slurm/test_training.py::test_"

ROWS = {
    "saves": Row("kill -9 at random moments of a save loop", "0 unloadable, 0 finished saves lost", saves, 200),
    "kills-2": Row("kill -9 of a run at seeded moments, 2 processes", "the same bits at the end", kills(2), 20),
    "kills-3": Row("kill -9 of a run at seeded moments, 3 processes", "the same bits at the end", kills(3), 20),
    "stops": Row("stop signal to `simclr-dist train`, 0 to 12 s after its start", "0 lost, exit code 75", stops, 20),
    "parts": Row("kill -9 of a rank or of torchrun", "goes on by itself, at most one interval lost", parts, 10),
    "one-rank": Row(
        "SIGTERM, SIGUSR1, SIGUSR2 to all ranks, to one; without end to all processes; during a save; before the first step",
        "0 lost, all ranks stop at one step",
        tests(
            STOPS + "any_signal_to_all_ranks_or_to_one",
            STOPS + "signals_without_end_to_everybody",
            STOPS + "during_a_save",
            STOPS + "before_the_first_step",
        ),
        5,
    ),
    "hang": Row(
        "a rank that hangs (time-out 3 s)",
        "detected within 8 s",
        tests(CRASHES + "a_rank_that_hangs_ends_the_others_in_time"),
        5,
    ),
    "numbers": Row(
        "a changed number in one rank's memory",
        "the run ends before it is saved",
        tests(CRASHES + "a_rank_with_other_numbers_ends_the_run_before_they_are_saved", "train/test_agreement.py"),
        5,
    ),
    "writers": Row(
        "two starts into one folder; a writer that comes back",
        "one writer",
        tests(
            CRASHES + "a_second_start_is_refused_and_the_first_unharmed",
            CRASHES + "a_writer_that_was_cut_off_writes_nothing_more",
        ),
        5,
    ),
    "damage": Row(
        "truncated, bit-flipped, missing file in the newest checkpoint",
        "the older one is used, and said",
        tests("run/test_checkpoint.py"),
        1,
    ),
    "state": Row(
        "damaged state files: each file, each kind of damage, each reader",
        "mended, or one line and exit code 2; no traceback",
        tests("faults/test_damaged_state.py", "faults/test_damaged_shards.py", "train/test_misfit.py"),
        1,
    ),
    "leftovers": Row(
        "kill -9 in the middle of a write of each kind",
        "no temporary file after the next start",
        tests("faults/test_leftovers.py"),
        3,
    ),
    "hangup": Row(
        "SIGHUP: the terminal goes, of 1 and 2 ranks, `submit --local` and `shard`; under nohup",
        "0 steps lost, exit code 75; under nohup done",
        tests("cli/test_lost_terminal.py"),
        3,
    ),
    "disk": Row("disk full, folder read-only during a save", "goes on or stops cleanly; the old one intact", tests(DISK), 5),
    "shared": Row(
        "/dev/shm full: 64 MB, 64 KB",
        "one line with the cure, exit code 2, no hang, no second start",
        tests(
            SHARED + "that_fills_while_a_run_trains_ends_it_in_one_line",
            SHARED + "that_cannot_hold_a_step_is_refused_before_ranks_start",
        ),
        5,
    ),
    "workers": Row(
        "a reading process that stands still (time-out 2 s; and a stop then), or is killed",
        "one line, ends in time; after a stop 0 lost, the same bits",
        tests(
            SHARED + "a_stop_while_a_worker_stands_still_saves_every_step",
            SHARED + "a_worker_that_stands_still_ends_the_run_in_time",
            SHARED + "a_worker_that_is_killed_ends_the_run_in_one_line",
        ),
        5,
    ),
    "dies": Row(
        "SLURM, `launch/train.sbatch`: a rank that always dies",
        "4 starts, then the job ends",
        tests(LAUNCHED + "a_rank_that_always_dies_is_given_up"),
        3,
    ),
    "port": Row(
        "SLURM: the port of `launch/train.sbatch` is listened at, held, held at every start; that of a job of `submit`",
        "goes on at another port; at every start: 4 starts, then the job ends",
        tests(
            LAUNCHED + "a_port_that_is_taken_does_not_end_the_run",
            TRAINED + "the_port_of_a_job_that_is_taken_is_another_one_in_the_next_start",
        ),
        3,
    ),
    "scontrol": Row(
        "SLURM: `scontrol` answers after 3 s, at a stop and at a cancel",
        "goes on with 0 lost; cancelled stays cancelled",
        tests(TRAINED + "a_scontrol_that_answers_late_revives_nothing_that_was_cancelled"),
        3,
    ),
    "watchers": Row(
        "scancel beside a watcher: of a job that trains, of one in the queue (a real SLURM)",
        "the watcher ends, once; stopped before, it comes back",
        tests("slurm/test_watchers.py"),
        3,
    ),
    "sizes": Row("2, 1, 3, 2 ranks", "the same negatives", tests(STOPS + "a_run_goes_on_with_another_number_of_ranks"), 3),
}


def main() -> int:
    """Run and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--times", type=int, help="of every row, in the place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} x {platform.machine()}\n")
    print("| fault | times | must | found | s |\n|---|---|---|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        shards = runs.make_shards(Path(temporary), images=96)
        for name in names:
            row, began = ROWS[name], time.monotonic()
            folder = Path(temporary, name)
            folder.mkdir()
            times = arguments.times or row.times
            try:
                found = row.find(Place(folder, shards, times, arguments.seed))
            except AssertionError as error:
                failed, found = True, f"FAILED: {_short(error)}"
                print(error, file=sys.stderr)
            print(f"| {row.fault} | {times} | {row.must} | {found} | {time.monotonic() - began:.0f} |", flush=True)
    return int(failed)


def _short(error: Any) -> str:
    lines = str(error).splitlines() or ["?"]
    return lines[0].replace("|", "/")[:200]


if __name__ == "__main__":
    sys.exit(main())
