"""What a rank leaves for its launcher."""

import json
from pathlib import Path

import pytest

from simclr_dist.run.status import End, end_of, leave_note, read_notes
from simclr_dist.system.errors import LAST_WORD, DivergedError, LostRankError


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
    assert read_notes(tmp_path / "note") == ends
