"""Remote shards through the cache: right bytes, one fetch for all, a limit that holds, and kills that leave nothing."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from simclr_dist.data.collection import load_collection
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import CacheSettings, ShardCache, cache_settings
from simclr_dist.data.remote.fetch import Patience
from simclr_dist.system.errors import ConfigError, DataError, UnreachableError
from small_shards import Server, png, serve, write_small_shards

QUICK = Patience(seconds=20, stall=0.5, first_wait=0.01)
SIZES = [3, 4, 5, 2, 6]
PADDING = 20_000  # bytes of a shard that matter little beside those of its images


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_shards(tmp_path_factory.mktemp("remote"), SIZES, padding=PADDING)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serve(shards) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def largest(shards: Path) -> int:
    return max(path.stat().st_size for path in shards.glob("*.tar"))


def left(folder: Path, kind: str) -> int:
    return len(list(folder.glob(f"*.{kind}")))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_image_is_the_servers_and_each_shard_comes_once(server: Server, folder: Path) -> None:
    for _ in range(2):
        images = ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK))
        assert [images.read(row) for row in range(20)] == [png(row) for row in range(20)]
        assert [images[row].label for row in (0, 1, 2)] == [0, 1, 2]
    assert {name: count for name, count in server.asked.items() if name.endswith("tar")} == {
        f"train-{shard:06d}.tar": 1 for shard in range(5)
    }
    assert left(folder, "part") == 0


def test_the_same_shards_at_another_address_are_found_again(server: Server, shards: Path, folder: Path) -> None:
    settings = CacheSettings(folder, 1 << 30, QUICK)
    ShardDataset(server.url, cache=settings).read(0)
    with serve(shards) as other:
        assert ShardDataset(f"{other.url}/train-00000{{0..2}}.tar", cache=settings).read(0) == png(0)
        assert other.asked["train-000000.tar"] == 0


@pytest.mark.parametrize("faults", [["stall"], ["cut"], [500], [404], ["wrong"], ["cut", 503, "stall", "wrong"]])
def test_a_shard_that_comes_badly_comes_again(server: Server, folder: Path, faults: list[str | int]) -> None:
    server.faults["train-000002.tar"] = list(faults)
    images = ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK))
    assert images.read(8) == png(8)
    assert images.read(11) == png(11)
    assert server.asked["train-000002.tar"] == 1 + len(faults)


def test_wrong_bytes_that_stay_wrong_are_named_after_a_second_fetch(server: Server, folder: Path) -> None:
    server.faults["train-000002.tar"] = ["wrong"] * 10
    images = [ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK)) for _ in range(2)]
    for row in (8, 9):
        for reader in images:
            with pytest.raises(DataError, match=rf"^{server.url}/train-000002.tar: image {row:06d}: [^\n]*sha256") as caught:
                reader.read(row)
            assert not isinstance(caught.value, UnreachableError), "an image's fault, so that a spare may replace it"
    assert server.asked["train-000002.tar"] == 2, "no image after the first makes it come a third time"
    server.faults.clear()
    (marker,) = folder.glob("*.again")
    os.utime(marker, (1, 1))  # long ago
    assert ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK)).read(8) == png(8), "the server was mended"


def test_a_file_of_the_cache_that_was_damaged_is_fetched_again(server: Server, folder: Path) -> None:
    settings = CacheSettings(folder, 1 << 30, QUICK)
    url = f"{server.url}/train-000000.tar"
    ShardDataset(url, cache=settings).read(0)
    (file,) = folder.glob("*.tar")
    for content in (bytes(file.stat().st_size), b""):
        file.write_bytes(content)
        for marker in folder.glob("*.again"):
            os.utime(marker, (1, 1))  # of an earlier run
        assert ShardDataset(url, cache=settings).read(1) == png(1)


def test_a_server_that_stays_away_is_one_line_for_all_who_wait(server: Server, folder: Path) -> None:
    server.faults["train-000000.tar"] = [500] * 10_000
    images = ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, Patience(4, 0.5, 0.05)))
    errors: list[UserWarning | Exception] = []

    def read() -> None:
        try:
            images._cache.open(0)  # type: ignore[union-attr]
        except UnreachableError as error:
            errors.append(error)

    began = time.monotonic()
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4
    assert len({str(error) for error in errors}) == 1, "said by one, and passed on to those who waited"
    assert f"{server.url}/train-000000.tar: cannot be fetched: the server says 500" in str(errors[0])
    assert time.monotonic() - began < 12
    server.faults.clear()
    assert images.read(0) == png(0)


def test_the_limit_holds_and_the_longest_unused_go_first(server: Server, shards: Path, folder: Path) -> None:
    limit = 3 * largest(shards)
    manifest = load_collection(server.url)
    cache = ShardCache(manifest, CacheSettings(folder, limit, QUICK))
    for shard in (0, 1, 2, 0, 3):
        os.close(cache.open(shard))
        time.sleep(0.01)
        assert sum(path.stat().st_size for path in folder.glob("*.*")) <= limit
    assert [shard for shard in range(5) if cache.has(shard)] == [0, 2, 3]


def test_what_is_being_read_stays_for_every_process(server: Server, shards: Path, folder: Path) -> None:
    settings = CacheSettings(folder, 2 * largest(shards), Patience(0.5, 0.5, 0.01))
    manifest = load_collection(server.url)
    cache, other = ShardCache(manifest, settings), ShardCache(manifest, settings)
    read = [cache.open(0), cache.open(1)]
    with pytest.raises(UnreachableError, match=r"^data.cache_gib: [^\n]* GiB in [^\n]* shards that are being read[^\n]*$"):
        other.open(4)
    assert not other.fetch_ahead(4, (), lambda: False), "ahead of need it does not wait"
    os.close(read.pop())
    os.close(other.open(4))
    assert [shard for shard in range(5) if cache.has(shard)] == [0, 4]
    os.close(read.pop())


def test_what_is_needed_next_does_not_make_room_for_what_comes_after(server: Server, shards: Path, folder: Path) -> None:
    cache = ShardCache(load_collection(server.url), CacheSettings(folder, 2 * largest(shards), QUICK))
    for shard in (0, 1):
        os.close(cache.open(shard))
    assert not cache.fetch_ahead(2, (0, 1, 2), lambda: False)
    assert cache.fetch_ahead(2, (1, 2), lambda: False)
    assert [shard for shard in range(5) if cache.has(shard)] == [1, 2]


def test_files_of_others_in_the_folder_are_not_removed(server: Server, shards: Path, folder: Path) -> None:
    folder.mkdir()
    mine = [folder / name for name in ("photos.tar", "photos.part", "a.b.part", "deadbeef.tar")]
    for path in mine:
        path.write_bytes(bytes(2 * largest(shards)))
        os.utime(path, (1, 1))
    cache = ShardCache(load_collection(server.url), CacheSettings(folder, 2 * largest(shards), QUICK))
    for shard in range(5):
        os.close(cache.open(shard))
    assert all(map(Path.exists, mine))


def test_a_limit_that_is_too_small_is_refused(server: Server, shards: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.cache_gib: \S+ GiB are too few for http[^\n]*largest shard has [^\n]*$"):
        ShardDataset(server.url, cache=CacheSettings(folder, largest(shards) - 1))
    images = ShardDataset(server.url, cache=CacheSettings(folder, largest(shards)))
    images.check_room(1, "x")
    with pytest.raises(
        ConfigError, match=r"^data.cache_gib: \S+ GiB are too few [^\n]*: the two take up to \S+ GiB; raise it$"
    ):
        images.check_room(2, "the two")


def test_the_order_is_fetched_ahead(server: Server, folder: Path) -> None:
    images = ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK))
    images.expect([1], [3, 2])
    until(lambda: left(folder, "tar") == 3)
    assert server.asked["train-000000.tar"] == 0
    images.expect([1], [3, 2])
    assert images.read(3) == png(3)
    images.expect([3], [0])
    assert images.read(12) == png(12)
    until(lambda: left(folder, "tar") == 4)
    server.stop()
    images.expect([2], [])
    assert images.read(7) == png(7), "there before it was needed"
    server.stop = lambda: None  # type: ignore[method-assign]


def test_reading_in_the_manifests_order_fetches_ahead(server: Server, folder: Path) -> None:
    images = ShardDataset(server.url, cache=CacheSettings(folder, 1 << 30, QUICK))
    images.read(0)
    until(lambda: left(folder, "tar") == 3)
    images.read(4)
    until(lambda: left(folder, "tar") == 4)


def test_no_more_files_are_open_than_the_windows(server: Server, folder: Path) -> None:
    images = ShardDataset(server.url, open_shards=2, cache=CacheSettings(folder, 1 << 30, QUICK))
    for now in ([0, 1, 2, 3], [2, 3], [4], [0, 4]):
        images.expect(now, [])
        for row in range(20):
            if int(images.manifest.shard[row]) in now:
                images.read(row)
        assert len(open_tars(folder)) <= 2
    del images
    assert not open_tars(folder)


def open_tars(folder: Path) -> list[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208 (names, as some are gone)
    targets = [os.readlink(link) for link in links if link.is_symlink()]  # noqa: PTH115 (the link's text is wanted)
    return [target for target in targets if target.startswith(str(folder)) and target.endswith(".tar")]


READER = """
import sys
from pathlib import Path
from simclr_dist.data.remote.cache import CacheSettings, ShardCache
from simclr_dist.data.collection import load_collection
from simclr_dist.data.remote.fetch import Patience
import os
url, folder, limit, shards = sys.argv[1:]
manifest = load_collection(url)
cache = ShardCache(manifest, CacheSettings(Path(folder), int(limit), Patience(60, 5, .01)))
print("ready", flush=True)
sys.stdin.readline()
for shard in map(int, shards.split(",")):
    descriptor = cache.open(shard)
    assert os.fstat(descriptor).st_size == manifest.shard_bytes[shard]
    os.close(descriptor)
print("done", flush=True)
"""


def reader(server: Server, folder: Path, limit: int, order: list[int]) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", READER, server.url, str(folder), str(limit), ",".join(map(str, order))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_two_processes_fetch_each_shard_once(server: Server, folder: Path) -> None:
    server.slow = 0.1
    readers = [reader(server, folder, 1 << 30, order) for order in ([0, 1, 2, 3, 4], [0, 2, 1, 4, 3])]
    go(*readers)
    assert [process.communicate(timeout=60)[0] for process in readers] == ["done\n"] * 2
    assert [process.returncode for process in readers] == [0, 0]
    assert {count for name, count in server.asked.items() if name.endswith("tar")} == {1}


def test_two_processes_in_a_cache_for_two_shards(server: Server, shards: Path, folder: Path) -> None:
    limit = 2 * largest(shards)
    readers = [reader(server, folder, limit, [*order] * 6) for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2])]
    go(*readers)
    assert [process.communicate(timeout=60)[0] for process in readers] == ["done\n"] * 2
    assert sum(path.stat().st_size for path in folder.glob("*.*")) <= limit


def test_a_fetcher_that_is_killed_blocks_nobody_and_leaves_nothing(server: Server, folder: Path) -> None:
    server.faults["train-000001.tar"] = ["stall"]
    killed, waiting = (reader(server, folder, 1 << 30, [1]) for _ in range(2))
    go(killed)
    until(lambda: server.asked["train-000001.tar"] == 1 and left(folder, "part") == 1)
    go(waiting)
    time.sleep(0.3)
    assert server.asked["train-000001.tar"] == 1, "it waits for the other"
    killed.send_signal(signal.SIGKILL)
    assert waiting.communicate(timeout=20)[0] == "done\n"
    killed.communicate()
    assert server.asked["train-000001.tar"] == 2
    assert left(folder, "part") == 0
    assert left(folder, "tar") == 1


def test_a_killed_processs_lock_does_not_live_on_in_its_child(server: Server, folder: Path) -> None:
    """Two forks: of one that holds the lock and is killed, and of its child."""
    cache = ShardCache(load_collection(server.url), CacheSettings(folder, 1 << 30, QUICK))
    told, telling = os.pipe()
    holder = os.fork()
    if holder == 0:
        with cache._lock("x"):
            child = os.fork()
            if child:
                os.write(telling, f"{child}\n".encode())
            time.sleep(30)
        os._exit(0)
    child = int(os.read(told, 20))
    try:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with (folder / "locks" / "x").open() as file:
            until(lambda: locked(file))
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(told)
        os.close(telling)


def locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIMCLR_DIST_CACHE", "SIMCLR_DIST_CACHE_GIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_settings() == CacheSettings(tmp_path / "simclr_dist" / "shards", 100 << 30)
    monkeypatch.setenv("SIMCLR_DIST_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("SIMCLR_DIST_CACHE_GIB", "0.5")
    assert cache_settings() == CacheSettings(tmp_path / "a", 1 << 29)
    monkeypatch.setenv("SCRATCH_HERE", "/scratch")
    assert cache_settings("$SCRATCH_HERE/b", 2) == CacheSettings(Path("/scratch/b"), 2 << 30)
    with pytest.raises(ConfigError, match=r"data.cache: '\$NOT_SET_HERE/b' holds a variable that is not set"):
        cache_settings("$NOT_SET_HERE/b")
    monkeypatch.setenv("SIMCLR_DIST_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="SIMCLR_DIST_CACHE_GIB: 'much' is not a number"):
        cache_settings()


def test_a_cache_that_cannot_be_is_one_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=rf"^data.cache: {tmp_path}/file/x: cannot be made: Not a directory; name another folder$"
    ):
        ShardDataset(server.url, cache=CacheSettings(tmp_path / "file" / "x", 1 << 30))


def test_the_plan_names_the_shards_that_a_step_needs() -> None:
    manifest_sizes = np.random.default_rng(0).integers(1, 30, 17)
    for batch, window in ((7, 2), (20, 3), (50, 1), (13, 9)):
        plan = Plan(manifest_sizes, seed=5, global_batch_size=batch, window=window)
        shard_of = manifest_sizes.cumsum()
        for step in range(3 * plan.steps_per_epoch):
            now, ahead = plan.shards_around(step)
            read = set(shard_of.searchsorted(plan[step][1], side="right").tolist())
            assert read <= set(now.tolist())
            assert len(now) <= plan.shards_at_once(1)
            following = set(shard_of.searchsorted(plan[step + 1][1], side="right").tolist())
            first_of_next = plan[step + 1][1][0]
            assert following & {*now.tolist(), *ahead.tolist()}
            assert shard_of.searchsorted(first_of_next, side="right") in {*now.tolist(), *ahead.tolist()}
