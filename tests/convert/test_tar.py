"""Members of a tar against Python's tarfile, and what that passes over without a word."""

import io
import tarfile
from pathlib import Path

import pytest

import cpu_time
from simclr_dist.convert.sources.tar import tar_members
from simclr_dist.system.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(path: Path, names: list[str], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number * 300
            tar.addfile(member, io.BytesIO(bytes([number % 256]) * member.size))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_names_and_places_are_tarfiles(tmp_path: Path, kind: str) -> None:
    names = ["a.jpg", "b/" * 40 + "c.png", "f" * 90 + ".json", "Käse/ü.jpg"]
    if kind != "ustar":
        names += ["long/" * 60 + "name.jpg", "x" * 300, "日本" * 80 + ".webp", "one line\nand another.jpg"]
    path = pack(tmp_path / "a.tar", names, FORMATS[kind])
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size, None) for member in tar]
    assert [tuple(member) for member in tar_members(path)] == expected


def test_pax_sizes_and_global_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"}) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.mtime = 5, 0.5
        member.pax_headers = {"SCHILY.xattr.user.note": "x=y"}
        tar.addfile(member, io.BytesIO(b"12345"))
    (only,) = tar_members(path)
    assert path.read_bytes()[only.offset : only.offset + only.size] == b"12345"


def test_long_headers_of_many_records_are_read_in_one_go(tmp_path: Path) -> None:
    """A quadratic reader takes a quarter of a minute for these."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 20
    last = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    headers = (member.tobuf(tarfile.USTAR_FORMAT) + b"8 a=bcd\n" * (1 << 17) + last) * 6
    (tmp_path / "a.tar").write_bytes(headers + bytes(10_240))
    with cpu_time.at_most(9):
        assert [member.name for member in tar_members(tmp_path / "a.tar")] == ["a.jpg"] * 6


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    kinds = {tarfile.SYMTYPE: "a link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert [member.problem for member in tar_members(path)] == list(kinds.values())


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(tar_members(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_damage_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", ["a", "b", "c", "d"])
    whole = path.read_bytes()
    third = [member.offset for member in tar_members(path)][2] - 512
    path.write_bytes(whole[: third + 20] + b"\xff" + whole[third + 21 :])
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 2, "tarfile says nothing"
    assert f"is damaged, or no tar (at byte {third})" in refused(path)
    for end, says in (
        (third, "no end mark"),
        (third + 100, "no end mark"),
        (third + 700, "in the middle of c"),
        (0, "end mark"),
    ):
        path.write_bytes(whole[:end])
        assert says in refused(path) or "without an end mark" in refused(path)
    path.write_bytes(whole + whole)
    assert "behind its end mark" in refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b" + bytes(600), "compressed (gzip)"),
        (b"(\xb5/\xfd" + bytes(600), "compressed (zstd)"),
        (b"text " * 200, "damaged, or no tar"),
        (b"short", "without an end mark"),
    ],
)
def test_no_tar(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert says in refused(path)
    assert "No such file" in refused(tmp_path / "none.tar")


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, (1 << 20) + 1
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 20) + 4096)
    assert "a header of 1048577 bytes" in refused(path)


def test_sizes_beyond_octal(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    member = tarfile.TarInfo("a")
    member.size = 9 << 30
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate((9 << 30) + 512 + 10240)
    assert [tuple(found) for found in tar_members(path)] == [("a", 512, 9 << 30, None)]
