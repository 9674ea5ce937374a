"""Tars from front to back: compressed or not the same files, and no header that takes the memory of the machine."""

import bz2
import gzip
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from simclr_dist.data.tar_stream import TAR_ERRORS, tar_files
from small_shards import png, write_tar

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
}
ZEROS = 100 << 20
REPEATED = 8


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


BOMBS = {f"{kind!r}": (header(kind, 3 << 30), "a header of 3221225472 bytes") for kind in (b"x", b"g", b"X", b"L", b"K")} | {
    "negative": (header(b"0", -5), "a header of -5 bytes"),
    "sparse": (header(b"S", 1), "a sparse file"),
    "sparse map": (pax(b"x", "GNU.sparse.major=1", "GNU.sparse.minor=0") + header(b"0", 1 << 20), "a sparse file"),
    "chain": (pax(b"x", "a=b") * 2000, "more than 10 headers for one file"),
    "shared": (b"".join(pax(b"g", f"{k}={'v' * 60000}") + header(b"0", 0) for k in range(5)), "its shared headers are too"),
    "large file": (header(b"0", 7 * ZEROS), "None"),
}  # fmt: skip


@pytest.mark.parametrize("packed", PACKED)
def test_headers_that_claim_gigabytes(tmp_path: Path, packed: str) -> None:
    """The zeros that they claim are there, and the process may take no more than 400 MB."""
    zeros = PACKED[packed](bytes(ZEROS)) * REPEATED if packed != "tar" else b""
    for number, (content, _) in enumerate(BOMBS.values()):
        with (tmp_path / str(number)).open("wb") as file:
            file.write(PACKED[packed](content) + zeros)
            file.truncate(None if zeros else REPEATED * ZEROS)
    code = (
        "import resource, sys\n"
        "from simclr_dist.data.tar_stream import TAR_ERRORS, tar_files\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        with open(name, 'rb') as file:\n"
        "            print(*[content for _, content in tar_files(file) if content is None])\n"
        "    except TAR_ERRORS as error:\n"
        "        print(error)\n"
    )
    names = [str(tmp_path / str(number)) for number in range(len(BOMBS))]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (bomb, (_, reason)) in zip(done.stdout.splitlines(), BOMBS.items(), strict=True):
        assert line.startswith(reason), bomb
