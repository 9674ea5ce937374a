"""Tars without a manifest: which images come, how failing ones are told, and what is refused before it is opened."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simclr_dist.data.remote.cache import CacheSettings
from simclr_dist.data.remote.fetch import Patience
from simclr_dist.data.steps import StepDataset, Views, load_steps
from simclr_dist.data.stream import StreamImages, StreamPlan
from simclr_dist.data.views.draws import ViewSettings, draw_views
from simclr_dist.system.errors import ConfigError, DataError, RankError
from small_shards import SIDE, png, serve, write_tar

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
]
VIEWS = ViewSettings(image_size=SIDE)
TARS = 12
EACH = 5


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 tars of 5 pictures; picture k is in tar k // 5."""
    folder = tmp_path_factory.mktemp("tars")
    for tar in range(TARS):
        members = [
            (f"{k:04d}.{kind}", content)
            for k in range(tar * EACH, (tar + 1) * EACH)
            for kind, content in (("cls", str(k).encode()), ("png", png(k)))
        ]
        write_tar(folder / f"part-{tar:02d}.tar", members)
    return folder


def stream(where: object, *, rank: int = 0, world: int = 1, workers: int = 0, shuffle: int = 7, **more: object) -> StreamImages:
    return StreamImages(str(where), TARS * EACH, seed=1, rank=rank, world_size=world, workers=workers, shuffle=shuffle, **more)  # type: ignore[arg-type]


def steps_of(images: StreamImages, batch: int = 12, rank: int = 0, world: int = 1, *, bad: bool = False) -> StepDataset:
    plan = StreamPlan(np.array([images.samples]), 1, batch, rank=rank, world_size=world)
    return StepDataset(images, plan, VIEWS, replace_bad=bad)


def pattern(folder: Path) -> str:
    return f"{folder}/part-{{00..{TARS - 1}}}.tar"


@pytest.mark.parametrize("shuffle", [7, 1000])
def test_one_pass_gives_every_image_once(tars: Path, shuffle: int) -> None:
    images = stream(pattern(tars), shuffle=shuffle)
    labels = [images[row].label for row in range(2 * TARS * EACH)]
    assert sorted(labels[:60]) == sorted(labels[60:]) == list(range(60)), "a copy in a batch would be a false negative"
    assert list(range(60)) != labels[:60] != labels[60:]
    assert torch.equal(images[0].image, images[0].image) is False, "each asking gives the next one"


def test_pixels_are_the_tars(tars: Path) -> None:
    sample = stream(pattern(tars))[17]
    expected = np.asarray(Image.open(io.BytesIO(png(sample.label))))
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), expected)
    assert sample.row == 17


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 3), (3, 2), (2, 4)])
def test_ranks_and_workers_share_the_tars_and_take_equal_steps(tars: Path, world: int, workers: int) -> None:
    ranks = []
    for rank in range(world):
        images = stream(pattern(tars), rank=rank, world=world, workers=workers, shuffle=1)
        ranks.append(list(load_steps(steps_of(images, rank=rank, world=world), range(9), workers=workers)))
    assert [len(steps) for steps in ranks] == [9] * world
    for parts in zip(*ranks, strict=True):
        step = parts[0].step
        numbers = torch.cat([views.rows for views in parts]).tolist()
        assert numbers == list(range(step % 5 * 12, step % 5 * 12 + 12)), "running numbers of the epoch"
        assert all(sum(len(portion.crops[0]) for portion in views.portions) == 12 // world for views in parts)
    parts_of = [stream(pattern(tars), rank=rank, world=world, workers=workers)._shards[rank::world] for rank in range(world)]
    assert len({tar for part in parts_of for tar in part}) == TARS


def test_views_are_drawn_by_the_running_number(tars: Path) -> None:
    views = steps_of(stream(pattern(tars)))[7]
    assert views.rows.tolist() == list(range(24, 36))
    expected = draw_views(
        VIEWS, seed=1, epoch=1, rows=views.rows.numpy(), view=1, heights=np.full(12, SIDE), widths=np.full(12, SIDE)
    )
    (portion,) = views.portions
    assert all(np.array_equal(a, b) for a, b in zip(portion.draws[1], expected, strict=True))


def test_the_same_start_gives_the_same_and_another_start_another_order(tars: Path) -> None:
    def labels(start: int) -> list[int]:
        images = stream(pattern(tars))
        images.start = start
        return [images[row].label for row in range(40)]

    assert labels(0) == labels(0)
    assert labels(3) != labels(0)


def header_only(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_are_told_and_passed(tmp_path: Path) -> None:
    members = [
        ("a.png", png(1)),
        ("huge.png", header_only(10_001, 10_000)),
        ("cut.png", png(2)[:60]),
        ("text.jpg", b"no image"),
        ("none.txt", b"no image at all"),
        ("evil\n.jpg", b""),
        ("b.png", png(3)),
    ]
    write_tar(tmp_path / "x.tar", members)
    images = stream(tmp_path / "x.tar", shuffle=1)
    good, lines = [], []
    for row in range(7):
        try:
            good.append(images[row].row)
        except DataError as error:
            lines.append(str(error))
    assert len(good) == 2
    assert len(lines) == 5
    assert all(line.startswith(f"{tmp_path}/x.tar: image ") and "\n" not in line for line in lines)
    assert any(line.endswith("image huge: 10001 x 10000 is more than 100 megapixels") for line in lines)
    assert any("image none: has no member that ends in jpg" in line for line in lines)


def test_a_tar_that_is_cut_loses_its_end_only(tars: Path, tmp_path: Path) -> None:
    content = (tars / "part-00.tar").read_bytes()
    for name, kept in (("part-00.tar", content[:5700]), ("part-01.tar", (tars / "part-01.tar").read_bytes())):
        (tmp_path / name).write_bytes(kept)
    images = stream(f"{tmp_path}/part-{{00..01}}.tar", shuffle=1)
    labels, lines = set(), set()
    for row in range(40):
        try:
            labels.add(images[row].label)
        except DataError as error:
            lines.add(images.bad_sample(row, str(error)))
    assert {5, 6, 7, 8, 9} < labels
    assert f"{tmp_path}/part-00.tar: cannot be read to its end: unexpected end of data" in lines
    assert len(lines) <= 2, "the same names in every epoch; the image in whose middle it ends may have lost a member"


def test_a_damaged_or_missing_header_is_told(tmp_path: Path) -> None:
    places = write_tar(tmp_path / "x.tar", [(f"{k}.png", png(k)) for k in range(6)])
    content = bytearray((tmp_path / "x.tar").read_bytes())
    (tmp_path / "y.tar").write_bytes(content[: places["3.png"] - 512])
    content[places["3.png"] - 400] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    for name, why in (("x", "is damaged, or no tar"), ("y", "ends without an end mark; it may have been cut off")):
        images, lines = stream(tmp_path / f"{name}.tar", shuffle=1), []
        for row in range(8):
            try:
                images[row]
            except DataError as error:
                lines.append(str(error))
        at = places["3.png"] - 512
        assert lines == [f"{tmp_path}/{name}.tar: cannot be read to its end: {why} (at byte {at})"] * 2


def test_exif_turns_and_what_cannot_be_shown_is_one_line(tmp_path: Path) -> None:
    y, x = np.mgrid[:8, :16]
    picture = Image.fromarray(np.stack([x * 15, y * 30, x + y], -1).astype(np.uint8))

    def saved(kind: str, orientation: int = 1, **options: object) -> bytes:
        target, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        picture.save(target, kind, exif=exif, **options)
        return target.getvalue()

    turned = [(f"{kind}{n}.{kind}", saved(kind, n)) for kind in ("jpeg", "webp", "png") for n in range(1, 9)]
    frames = {"save_all": True, "append_images": [picture.rotate(180)], "lossless": True}
    rest = [
        ("moving0.webp", saved("webp", **frames)), ("moving1.gif", saved("gif", **frames)),
        ("cut0.gif", saved("gif")[:-40]), ("cut1.jpeg", saved("jpeg", progressive=True)[:-60]),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", turned + rest)
    images = stream(tmp_path / "x.tar", shuffle=1)
    for row, (name, content) in enumerate(turned):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
        assert np.array_equal(images[row].image.numpy(), expected), name
    for row in range(2):
        assert images[row].image.shape == (3, 8, 16)
    for name, why in (("cut0", "image file is truncated"), ("cut1", "cannot be decoded: Image is incomplete")):
        with pytest.raises(DataError, match=rf"^{tmp_path}/x.tar: image {name}: {why}[^\n/]*$"):
            images[0]


def test_of_many_images_the_first_frame_and_no_mask(tmp_path: Path) -> None:
    frames, target = [Image.new("RGB", (SIDE, SIDE), (k, 0, 0)) for k in (90, 180)], io.BytesIO()
    frames[0].save(target, "GIF", save_all=True, append_images=frames[1:])
    mask = io.BytesIO()
    Image.new("RGB", (3, 3)).save(mask, "PNG")
    write_tar(tmp_path / "x.tar", [("0.gif", target.getvalue()), ("1.mask.png", mask.getvalue()), ("1.png", png(1))])
    images = stream(tmp_path / "x.tar", shuffle=1)
    assert [tuple(images[row].image.shape) for row in range(2)] == [(3, SIDE, SIDE)] * 2


def test_steps_replace_bad_images_or_end(tmp_path: Path) -> None:
    for tar in range(2):
        write_tar(tmp_path / f"{tar}.tar", [(f"{k}.png", png(k) if k % 3 else b"bad") for k in range(20)])
    where = f"{tmp_path}/{{0..1}}.tar"
    images = stream(where, workers=2)
    views: list[Views] = list(load_steps(steps_of(images, 6, bad=True), range(6), workers=2))
    assert [len(each.rows) for each in views] == [6] * 6
    assert sum(len(each.bad) for each in views) > 4
    with pytest.raises(RankError, match=r"tar: image \d+: not an image"):
        list(load_steps(steps_of(stream(where), 6), range(6), workers=0))


def test_tars_without_anything_end_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("no ending", b"x")])
    with pytest.raises(RankError, match=r"^data.shards: [^\n]*/0.tar: no file with an ending in it, nor in 0 more tars$"):
        next(load_steps(steps_of(stream(tmp_path / "0.tar"), 6, bad=True), range(6), workers=0))


def test_links_and_folders_in_a_tar_are_passed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, target in (
            ("a.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("b", tarfile.DIRTYPE, ""),
            ("c.png", tarfile.LNKTYPE, "a.png"),
        ):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, target
            tar.addfile(about)
        about = tarfile.TarInfo("../../d.png")
        about.size = len(png(4))
        tar.addfile(about, io.BytesIO(png(4)))
    images = stream(tmp_path / "x.tar", shuffle=1)
    assert np.array_equal(images[0].image.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(png(4)))))


def test_a_server(tars: Path, tmp_path: Path) -> None:
    settings = CacheSettings(tmp_path / "c", 1 << 30, Patience(20, 0.5, 0.01))
    with serve(tars) as server:
        server.faults = {"part-03.tar": ["cut", 500, "stall"]}
        images = stream(f"{server.url}/part-{{00..11}}.tar", cache=settings)
        assert len({images[row].label for row in range(80)}) == 60
        assert server.asked["part-03.tar"] > 3
        assert not list((tmp_path / "c").iterdir()), "nothing is kept"
        server.faults = {f"part-{tar:02d}.tar": [403] * 100 for tar in range(12)}
        images = stream(f"{server.url}/part-{{00..11}}.tar", cache=settings)
        with pytest.raises(RankError, match=rf"^{server.url}/part-\d\d.tar: cannot be fetched: the server says 403 [^\n]*$"):
            next(load_steps(steps_of(images, bad=True), range(3), workers=0))


def test_shell_commands_run_only_when_they_may(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"pipe:touch {tmp_path}/ran; cat {tars}/part-{{00..11}}.tar"
    with pytest.raises(ConfigError, match=r"runs a shell command; if you trust it, add --data.allow_pipe true$"):
        stream(command)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch ran").touch()  # a file that is there, among others in braces
    with pytest.raises(ConfigError, match=r"'pipe:touch ran' runs a shell command"):
        stream(f"{{{tars}/part-00.tar,pipe:touch ran}}")
    assert not (tmp_path / "ran").exists()
    images = stream(command, allow_pipe=True)
    assert len({images[row].label for row in range(80)}) == 60
    assert (tmp_path / "ran").exists()
    failing = stream("pipe:exit 3", allow_pipe=True)
    with pytest.raises(DataError, match="pipe:exit 3: cannot be read to its end"):
        failing[0]


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("", r": is a folder; data.reader: stream needs its tars, like"),
        ("/part-{00..12}.tar", r"/part-12.tar: no such tar; data.shards: [^\n]* stands for 13"),
        ("/part-{00.tar", "Unbalanced braces"),
    ],
)
def test_what_is_not_there_is_one_line(tars: Path, where: str, line: str) -> None:
    with pytest.raises(DataError, match=rf"^[^\n]*{line}[^\n]*$"):
        stream(f"{tars}{where}")


def test_fewer_tars_than_readers_are_refused(tars: Path) -> None:
    with pytest.raises(ConfigError, match=r"12 tars are too few for 4 ranks with 4 readers each; lower data\.workers"):
        stream(pattern(tars), world=4, workers=4)


def test_what_names_the_data_is_not_where_it_is(tars: Path, tmp_path: Path) -> None:
    for path in tars.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert stream(pattern(tars)).digest == stream(pattern(tmp_path)).digest
    assert stream(pattern(tars)).digest != stream(f"{tars}/part-{{00..10}}.tar").digest
