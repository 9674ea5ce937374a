"""Tars from front to back: compressed or not the same files, and no header that takes the memory of the machine."""

import bz2
import gzip
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from simclr_dist.data import tar_stream
from simclr_dist.data.tar_stream import TAR_ERRORS, tar_files
from small_shards import png, write_tar

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
}
ZEROS = 4 << 20
MOST = 1 << 20  # bytes held at once


def read_all(path: Path) -> list[tuple[str, bytes | None]]:
    with path.open("rb") as file:
        return list(tar_files(file))


def header(kind: bytes, size: int, name: str = "x.png") -> bytes:
    about = tarfile.TarInfo(name)
    about.type, about.size = kind, size
    return about.tobuf(tarfile.GNU_FORMAT)


def pax(kind: bytes, *texts: str) -> bytes:
    records = b""
    for text in texts:
        records += next(line for n in range(len(text), len(text) + 9) if len(line := f"{n} {text}\n".encode()) == n)
    return header(kind, len(records)) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize("packed", PACKED)
def test_compressed_or_not(tmp_path: Path, packed: str) -> None:
    files: list[tuple[str, bytes | None]] = [(f"{k}.png", png(k)) for k in range(30)]
    write_tar(tmp_path / "plain", [(name, content or b"") for name, content in files])
    content = PACKED[packed]((tmp_path / "plain").read_bytes())
    (tmp_path / "x").write_bytes(content)
    assert read_all(tmp_path / "x") == files
    (tmp_path / "x").write_bytes(content[: len(content) // 2])
    with pytest.raises(TAR_ERRORS):
        read_all(tmp_path / "x")


def test_names_that_need_headers_of_their_own(tmp_path: Path) -> None:
    name = f"{'folder/' * 60}{'n' * 200}.png"
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / str(number), "w", format=kind, pax_headers={"comment": "of all"}) as tar:
            for _ in range(3):
                tar.addfile(tarfile.TarInfo(name))
        assert read_all(tmp_path / str(number)) == [(name, b"")] * 3


CLAIMS = {f"{kind!r}": (header(kind, 1 << 20), "has a header of 1048576 bytes") for kind in (b"x", b"g", b"X", b"L", b"K")} | {
    "sparse": (header(b"S", 1), "has a sparse file"),
    "sparse map": (pax(b"x", "GNU.sparse.major=1", "GNU.sparse.minor=0") + header(b"0", 1 << 10), "has a sparse file"),
    "chain": (pax(b"x", "a=b") * 11, "has more than 10 headers for one file"),
    "shared": (b"".join(pax(b"g", f"{k}={'v' * 40000}") + header(b"0", 0) for k in range(2)), "has shared headers that"),
    "large file": (header(b"0", ZEROS // 2), None),
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKED)
def test_headers_that_claim_much(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zeros that they claim are there, and are never held all at once."""
    monkeypatch.setattr(tar_stream, "MAX_FILE_BYTES", ZEROS // 4)
    for claim, (content, reason) in CLAIMS.items():
        (tmp_path / "x").write_bytes(PACKED[packed](content + bytes(ZEROS)))
        tracemalloc.start()
        try:
            if reason is None:
                assert read_all(tmp_path / "x") == [("x.png", None)], claim
            else:
                with pytest.raises(TAR_ERRORS, match=f"^{reason}"):
                    read_all(tmp_path / "x")
            assert tracemalloc.get_traced_memory()[1] < MOST, claim
        finally:
            tracemalloc.stop()


def test_a_size_below_zero_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x", [("x.png", b"x")])
    parse = tarfile.TarInfo.frombuf.__func__

    def negative(cls: type[tarfile.TarInfo], *arguments: Any) -> tarfile.TarInfo:
        about = parse(cls, *arguments)
        about.size = -5
        return about

    monkeypatch.setattr(tarfile.TarInfo, "frombuf", classmethod(negative))
    with pytest.raises(TAR_ERRORS, match=r"^has a header of -5 bytes"):
        read_all(tmp_path / "x")
