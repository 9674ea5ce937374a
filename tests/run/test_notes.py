"""What a rank leaves for its launcher."""

import errno
import json
import pickle
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from simclr_dist.run.status import End, end_of, leave_note, read_notes
from simclr_dist.system.errors import LAST_WORD, ConfigError, DivergedError, LostRankError, SaveError


def test_a_note_that_no_disk_takes_hides_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LAST_WORD, str(tmp_path / "missing" / "note"))
    leave_note(end_of(ValueError("x")))
    monkeypatch.setenv(LAST_WORD, str(tmp_path / "note"))
    monkeypatch.setenv("RANK", "3")
    leave_note(end_of(ValueError("two\nlines")))
    assert json.loads((tmp_path / "note.3").read_text())["why"] == "ValueError: two lines"


def test_notes_are_read_by_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LAST_WORD, raising=False)
    assert leave_note(End("failed", 2)) == 2, "and nobody waits for it"
    monkeypatch.setenv(LAST_WORD, str(tmp_path / "note"))
    ends = {0: end_of(LostRankError("gone")), 11: end_of(DivergedError("step 3: \udc80"))}
    for rank, end in ends.items():
        monkeypatch.setenv("RANK", str(rank))
        assert leave_note(end) == end.code
    (tmp_path / "note.2").write_text('{"code": 1, "wh')
    (tmp_path / "torchrun.log").touch()
    torn = read_notes(tmp_path / "note").pop(2)
    assert torn.disk, "a full disk has cut it short"
    assert read_notes(tmp_path / "note") == {**ends, 2: torn}


@pytest.mark.parametrize(
    ("error", "disk"),
    [
        (SaveError("x.pt", OSError(errno.ENOSPC, "full")), True),
        (SaveError("x.pt", OSError(errno.EIO, "a network disk that stutters")), False),
        (OSError(errno.EROFS, "read-only", "metrics.jsonl"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (PermissionError(errno.EACCES, "forbidden"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (RuntimeError("No space left on device"), False),
    ],
)
def test_a_disk_that_refuses_is_told_from_an_accident(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, disk: bool
) -> None:
    """Also on the ranks that are told of it, by pickle."""
    monkeypatch.setenv(LAST_WORD, str(tmp_path / "note"))
    leave_note(end_of(pickle.loads(pickle.dumps(error))))
    (end,) = read_notes(tmp_path / "note").values()
    assert (end.disk, end.state, end.code) == (disk, "crashed", 1)


def test_torchrun_gets_the_reason_for_its_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    leave_note(end_of(ConfigError("seed: bad")))
    assert ProcessFailure(0, 1, 2, str(tmp_path / "error.json")).message["message"] == "seed: bad"
