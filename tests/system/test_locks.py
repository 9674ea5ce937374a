"""Locks on files: taken, held by another, or shared."""

from pathlib import Path

import pytest

from simclr_dist.system.files import lock, remove_leftovers, unlock, write_atomically


def test_one_holds_it_alone_and_many_share_it(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as first, (tmp_path / "a").open() as second:
        assert lock(first.fileno())
        assert not lock(second.fileno())
        assert not lock(second.fileno(), shared=True)
        unlock(first.fileno())
        assert lock(second.fileno(), shared=True)
        assert lock(first.fileno(), shared=True)
        assert not lock(first.fileno()), "another still shares it"
    with (tmp_path / "a").open() as third:
        assert lock(third.fileno(), wait=True), "closed files hold none"


def test_what_cannot_be_locked_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock(1 << 20)


def test_what_is_about_to_be_put_in_place_is_no_leftover(tmp_path: Path) -> None:
    """Not for another who writes the same file in that moment."""
    write_atomically(tmp_path / "status.json", b"new", allowed=lambda: remove_leftovers(tmp_path))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("status.json", b"new")]
