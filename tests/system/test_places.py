"""The variables by which a rank knows its place: all of them go together, and a wrong one is one line, at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_dist.cli.main import main
from simclr_dist.system.errors import RankError
from simclr_dist.system.ranks import Place, read_place

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
NAMES = (*WHOLE, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")
TOGETHER = (
    "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT go together, torchrun sets them; to run alone, unset RANK, WORLD_SIZE and"
    " LOCAL_RANK"
)
WRONG = [
    ({"RANK": ""}, "RANK: is not set, but WORLD_SIZE is '2', LOCAL_RANK is '0'"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE: is not set, but RANK is '1', LOCAL_RANK is '0'"),
    ({"RANK": "", "WORLD_SIZE": ""}, "WORLD_SIZE: is not set, but LOCAL_RANK is '0'"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR: is not set, but RANK is '1', WORLD_SIZE is '2', LOCAL_RANK is '0'"),
    ({"MASTER_PORT": ""}, "MASTER_PORT: is not set, but RANK is '1', WORLD_SIZE is '2', LOCAL_RANK is '0'"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a whole number from 1 to 1048576"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not a whole number from 1 to 1048576"),
    ({"WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE: '{'9' * 5000}' is not a whole number from 1 to 1048576"),
    ({"RANK": "-1"}, "RANK: '-1' is not a whole number from 0 to 1, as WORLD_SIZE is 2"),
    ({"RANK": "2"}, "RANK: '2' is not a whole number from 0 to 1, as WORLD_SIZE is 2"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK: '2' is not a whole number from 0 to 1, as WORLD_SIZE is 2"),
    ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK: '1.0' is not a whole number from 0 to 1, as WORLD_SIZE is 2"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT: '0' is not a whole number from 1 to 65535"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT: '65536' is not a whole number from 1 to 65535"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http' is not a whole number from 1 to 65535"),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_place() == Place(0, 1, 0, None)
    monkeypatch.setenv("MASTER_ADDR", "left behind")  # alone, nobody looks at it
    assert read_place() == Place()
    monkeypatch.setattr(os, "environ", WHOLE)
    assert read_place() == Place(1, 2, 0, ("n1", 29500), restarted=False)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.setattr(os, "environ", {**WHOLE, "LOCAL_RANK": "", name: "1"})
        assert read_place() == Place(1, 2, 0, ("n1", 29500), restarted=True)


@pytest.mark.parametrize(("change", "line"), WRONG)
def test_what_is_no_place(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], line: str) -> None:
    monkeypatch.setattr(os, "environ", WHOLE | change)
    with pytest.raises(RankError) as refused:
        read_place()
    assert str(refused.value) == str(RankError(f"{line}; {TOGETHER}"))  # a long line is cut


@pytest.mark.parametrize("verb", ["train CONFIG", "eval ENCODER --train a --test b", "embed ENCODER SRC OUT.parquet"])
def test_every_verb_that_has_ranks_says_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    """And the rank that it befalls says it, whichever that is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(verb.split()) == 2
    line = f"simclr-dist: RANK: 'one' is not a whole number from 0 to 1, as WORLD_SIZE is 2; {TOGETHER}\n"
    assert capsys.readouterr() == ("", line)
    assert not list(tmp_path.iterdir())


def test_a_rank_of_a_command_without_ranks_is_not_mute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A platform has left RANK; of ranks only rank 0 tells a user's mistake."""
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    for verb in (["plan", "none.yaml"], ["train", "none.yaml"], ["shard", "none", "out"]):
        assert main(verb) == 2
        assert capsys.readouterr().err.startswith("simclr-dist: none")


def test_without_torch() -> None:
    code = "import sys; from simclr_dist.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "embed", "ENCODER", "SRC", "OUT.parquet"]
    done = subprocess.run(command, env={**os.environ, "RANK": "0"}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.count("\n")) == ("2 False\n", 1)
