"""No source drops a part of its input without a count. Links on disk are followed, those in archives never."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pictures import contents, encoded, stored
from simclr_dist.cli.main import main
from simclr_dist.convert.index import index_shards
from simclr_dist.convert.shards import write_shards
from simclr_dist.convert.sources.folders import walk
from simclr_dist.data.manifest import load_manifest
from simclr_dist.system.errors import DataError


def images(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:03d}.png").write_bytes(encoded(number))
    return folder


# ---- links on disk


def test_a_folder_of_links_is_the_folder_of_their_copies(tmp_path: Path) -> None:
    """Subsets such as ImageNet-100 are made of links to the class folders of the whole set."""
    for label in range(3):
        images(tmp_path / "full" / f"n{label}", 4, label * 4)
    links, copies = tmp_path / "links", tmp_path / "copies"
    links.mkdir()
    (links / "n0").symlink_to("../full/n0")
    (links / "n2").symlink_to(tmp_path / "full" / "n2")
    (links / "twin").symlink_to("n2")
    (links / "own").mkdir()
    (links / "own" / "one.png").symlink_to(tmp_path / "full" / "n1" / "004.png")
    shutil.copytree(links, copies)
    summaries = [write_shards(source, tmp_path / f"{source.name}-out", processes=1) for source in (links, copies)]
    for summary in summaries:
        assert summary.classes == ("n0", "n2", "own", "twin")
        assert (summary.written, summary.duplicates, summary.rejected, summary.skipped) == (13, 4, (), ())
        assert summary.links == (4 if summary is summaries[0] else 0)
    one, two = (contents(tmp_path / f"{name}-out") for name in ("links", "copies"))
    assert {name: one[name] for name in one if name != "conversion.json"} == {n: two[n] for n in two if n != "conversion.json"}


def test_links_that_lead_round_or_nowhere_are_named(tmp_path: Path) -> None:
    source = images(tmp_path / "sets" / "src" / "a" / "deep", 2).parents[1]
    images(tmp_path / "sets" / "other", 1, 7)
    for name, target in {
        "a/up": "..", "a/deep/far": "../../..", "a/me": ".", "b": "a", "ring": "ring2", "ring2": "ring",
        "c": "gone", "a/gone.png": "nothing", "out": "../other", "d": "/dev/null",
    }.items():  # fmt: skip
        (source / name).symlink_to(target)
    os.mkfifo(source / "a" / "pipe.png")
    (source / "empty" / "inside").mkdir(parents=True)
    summary = write_shards(source, tmp_path / "out", processes=1)
    found = {f"{folder}/deep/{number:03d}.png" for folder in "ab" for number in range(2)} | {"out/007.png"}
    assert set(stored(tmp_path / "out")) == found
    round_, nowhere = "a link to a folder above it", "a broken link (No such file or directory)"
    turns = dict.fromkeys(("up", "me", "deep/far"), round_) | {"gone.png": nowhere}
    ring = dict.fromkeys(("ring", "ring2"), "a broken link (Too many levels of symbolic links)")
    assert dict(summary.rejected) == {f"{folder}/{name}": reason for folder in "ab" for name, reason in turns.items()} | {
        "c": nowhere, **ring,
    }  # fmt: skip
    special = dict.fromkeys(("a/pipe.png", "b/pipe.png", "d"), "not a regular file")
    assert dict(summary.skipped) == special | {"empty/inside/": "an empty folder"}
    assert summary.duplicates == 2


def test_links_between_two_folders_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        images(tmp_path / name, 1, ord(name))
        (tmp_path / name / other).symlink_to(f"../{other}")
    names, rejected, _, links = walk(tmp_path)
    assert links == 2
    assert names == ["a/097.png", "a/b/098.png", "b/098.png", "b/a/097.png"]
    assert [problem.name for problem in rejected] == ["a/b/a", "b/a/b"]


def test_a_folder_that_cannot_be_listed_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "src" / "a", 1)
    real = os.scandir

    def scandir(path: Path) -> object:  # root may list everything
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"src/a: cannot be listed: Permission denied$"):
        write_shards(tmp_path / "src", tmp_path / "out")


# ---- every source


def folder(path: Path) -> dict[str, str]:
    images(path / "cat", 2)
    (path / "dog").mkdir()
    for name in (".hidden.png", "notes.txt", "more.tar", "more.zip", "more.tar.gz", "list.csv"):
        (path / "cat" / name).write_bytes(b"x")
    (path / "gone").symlink_to("nothing")
    packed, suffix = "a packed file; unpack it first", "no image's file extension"
    return {
        "dog/": "an empty folder", "cat/.hidden.png": "hidden", "cat/notes.txt": suffix, "cat/list.csv": suffix,
        "cat/more.tar": packed, "cat/more.zip": packed, "cat/more.tar.gz": packed,
        "gone": "a broken link (No such file or directory)",
    }  # fmt: skip


def tables(path: Path) -> dict[str, str]:
    images(path / "beside", 4)
    pq.write_table(pa.table({"image": [encoded(0), encoded(1)]}), path / "a.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path / "b.parquet")
    for name in ("README.md", "more.tar", ".hidden", "_SUCCESS"):
        (path / name).write_bytes(b"x")
    (path / "c.parquet").symlink_to("nothing")
    (path / "empty").mkdir()
    return {f"beside/{number:03d}.png": "an image beside tables" for number in range(4)} | {
        "b.parquet": "no rows", "README.md": "no table", "more.tar": "no table", "_SUCCESS": "no table", ".hidden": "hidden",
        "c.parquet": "a broken link (No such file or directory)", "empty/": "an empty folder",
    }  # fmt: skip


INSIDE = {  # of a tar or zip
    "cat/more.tar": "a packed file; unpack it first", "cat/note.txt": "no image's file extension", "cat/._0.png": "hidden",
    "__MACOSX/0.png": "hidden", "cat/soft.png": "a link", "dog": "a link", "../up.png": "a path that leads out ('..')",
    "/root.png": "an absolute path",
}  # fmt: skip


def tars(path: Path) -> dict[str, str]:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as tar:
        directory = tarfile.TarInfo("cat")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name in ("cat/0.png", "cat/1.png", *INSIDE):
            member = tarfile.TarInfo(name)
            if INSIDE.get(name) == "a link":
                member.type, member.linkname = tarfile.SYMTYPE, "0.png"
            content = encoded(len(name)) if member.isreg() else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("README", ".hidden", "b.tar.gz"):
        (path / name).write_bytes(b"x")
    beside = {"README": "no archive", "b.tar.gz": "no archive", ".hidden": "hidden"}
    return {f"a.tar/{name}": reason for name, reason in INSIDE.items()} | beside


def zips(path: Path) -> dict[str, str]:
    path.mkdir()
    with zipfile.ZipFile(path / "a.zip", "w") as packed:
        for number, name in enumerate(("cat/", "cat/0.png", "cat/1.png", *INSIDE)):
            entry = zipfile.ZipInfo(name)
            if INSIDE.get(name) == "a link":
                entry.create_system, entry.external_attr = 3, 0o120777 << 16
            packed.writestr(entry, b"" if name.endswith("/") else encoded(number))
    return {f"a.zip/{name}": reason for name, reason in INSIDE.items()}


def listed(path: Path) -> dict[str, str]:
    images(path, 2)
    (path / "soft.png").symlink_to("nothing")
    (path / "list.csv").write_text("000.png\n001.png\n000.png\n../up.png\n/abs.png\nsoft.png\n.\n")
    nothing = {"soft.png": "No such file or directory", "list.csv:7: .": "no path"}
    up = {"list.csv:4: ../up.png": "a path that leads out ('..')", "list.csv:5: /abs.png": "an absolute path"}
    return {"list.csv:3: 000.png": "listed twice"} | up | nothing


@pytest.mark.parametrize("make", [folder, tables, tars, zips, listed])
def test_what_is_left_out_is_counted_by_reason(
    tmp_path: Path, make: Callable[[Path], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = make(tmp_path / "src")
    source = tmp_path / "src" / ("list.csv" if make is listed else "")
    summary = write_shards(source, tmp_path / "out", processes=1)
    assert summary.written == 2
    assert dict(summary.rejected) | dict(summary.skipped) == expected
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    reasons = Counter(reason for _, reason in summary.skipped)
    assert (record["rejected"], record["skipped"]) == (len(summary.rejected), dict(reasons))
    assert main(["shard", str(source), str(tmp_path / "out"), "--processes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("was done already, with the same settings from the same files; nothing is written")
    for reason, count in reasons.items():
        assert [line for line in lines if line.startswith(f"passed over: {count}, like ") and line.endswith(f" ({reason})")]
    if summary.rejected:
        assert f"left out: {len(summary.rejected)} in all, listed in {tmp_path / 'out' / 'rejected.jsonl'}" in lines


def test_a_record_of_an_earlier_version_is_still_read(tmp_path: Path) -> None:
    images(tmp_path / "src", 2)
    write_shards(tmp_path / "src", tmp_path / "out", processes=1)
    path = tmp_path / "out" / "conversion.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in ("rejected", "skipped")}))
    assert write_shards(tmp_path / "src", tmp_path / "out", processes=1).already


def test_an_archive_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:  # ImageNet's tar holds a tar for each class
        for number in range(3):
            tar.addfile(tarfile.TarInfo(f"n{number}.tar"))
    with pytest.raises(DataError, match=r"first of 3 that are left out: whole.tar/n0.tar \(a packed file; unpack it first\)$"):
        write_shards(tmp_path / "whole.tar", tmp_path / "out")


def test_the_index_counts_what_it_passes_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(path: Path, names: tuple[str, ...]) -> None:
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(content := encoded(len(name)))
                tar.addfile(member, io.BytesIO(content))

    write(tmp_path / "far" / "linked.tar", ("11.png",))
    write(tmp_path / "in" / "a.tar", ("0.png", "._0.png", "__MACOSX/0.png"))
    for name in ("note.txt", ".hidden.tar", "B.TAR"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "folder.tar").mkdir()
    (tmp_path / "in" / "linked.tar").symlink_to("../far/linked.tar")
    (tmp_path / "in" / "gone.tar").symlink_to("nothing")
    summary = index_shards(tmp_path / "in", processes=1)
    assert load_manifest(tmp_path / "in").key.tolist() == ["0", "11"]
    assert dict(summary.rejected) == {"gone.tar": "a broken link", "folder.tar": "not a regular file"}
    hidden = dict.fromkeys((".hidden.tar", "a.tar/._0.png", "a.tar/__MACOSX/0.png"), "hidden")
    assert dict(summary.skipped) == hidden | {"note.txt": "no .tar file", "B.TAR": "no .tar file", "sub": "a folder"}
    (tmp_path / "in" / "manifest.parquet").unlink()
    (tmp_path / "in" / "rejected.jsonl").unlink()
    assert main(["shard", "--index", str(tmp_path / "in"), "--processes", "1"]) == 0
    assert "passed over: 3, like .hidden.tar (hidden)" in capsys.readouterr().out
