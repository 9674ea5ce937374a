"""The folders of a config seen from each rank: shards that can be read, a run folder that all see, and how fast it is.

Every function is called on all ranks and returns the same findings on all; what is written is taken away again.
"""

import os
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from simclr_dist.config.settings import Config
from simclr_dist.config.together import check_fits
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import cache_settings
from simclr_dist.method.distributed import World, all_gather_objects
from simclr_dist.preflight.check.findings import Finding
from simclr_dist.system.errors import ConfigError, DataError

_SAMPLES = 64  # images that each rank reads and compares with their sha256
_WRITTEN_BYTES = 64 * 2**20
_VISIBLE_SECONDS = 10.0  # network disks show new files late


def shards(config: Config, here: World) -> list[Finding]:
    """Every rank opens the shards and reads some images of its own choice, checked by sha256; all see the same manifest."""
    if config.data.reader == "stream":
        return [
            Finding("shards", "warning", "a stream has no manifest to compare with", "`simclr-dist shard --index` writes one")
        ]
    problem, misfit, digest, rate, read = None, None, "", 0.0, 0
    try:
        images = ShardDataset(config.data.shards, open_shards=4, cache=cache_settings(config.data.cache, config.data.cache_gib))
        digest, misfit = images.manifest.digest, _misfit(config, len(images), here)
        random = np.random.default_rng([config.seed, here.rank])
        choice = np.arange(len(images))
        if isinstance(images.manifest.folder, str):  # a URL: one shard comes through the cache, not all of them
            choice = np.flatnonzero(images.manifest.shard == random.integers(len(images.manifest.shards)))
        rows = random.choice(choice, min(_SAMPLES, len(choice)), replace=False)
        read = len(rows)
        begin = time.perf_counter()
        size = sum(len(images.read(int(row))) for row in rows)
        rate = size / (time.perf_counter() - begin) / 2**20
    except (DataError, ConfigError) as error:
        problem = f"{_where(here)}: {error}"
    except OSError as error:
        problem = f"{_where(here)}: {error.filename or config.data.shards}: {error.strerror}"
    seen = all_gather_objects((problem, digest, rate))
    if problems := sorted({said for said, _, _ in seen if said is not None}):
        cure = "every node needs all shards, whole and readable: copy them anew, or put them on a shared disk"
        return [Finding("shards", "failure", line, cure) for line in problems]
    if len({digest for _, digest, _ in seen}) > 1:
        return [Finding("shards", "failure", f"{config.data.shards}: not the same images on every rank", "copy them anew")]
    if misfit is not None:  # of one manifest: on every rank
        return [Finding("shards", "failure", *misfit)]
    slowest = min(rate for _, _, rate in seen)
    return [Finding("shards", "ok", f"{read} images a rank are whole; the slowest rank reads {slowest:.0f} MiB/s")]


def _misfit(config: Config, images: int, here: World) -> tuple[str, str] | None:
    """Why the run does not fit these images and ranks, with the cure."""
    try:
        check_fits(config, images, here.size)
    except ConfigError as error:
        whole = "nothing is wrong with the shards: "
        if config.global_batch_size > images:
            return str(error), f"{whole}lower global_batch_size, or shard more images"
        return str(error), f"{whole}change that setting"
    return None


def folder(config: Config, here: World, checkpoint_bytes: float) -> tuple[list[Finding], float]:
    """What rank 0 writes beside the run folder the others see, and how long a checkpoint takes; (findings, its seconds)."""
    parent = Path(config.run_folder).absolute()
    while not os.path.lexists(parent):  # a file in the way stays, and is what cannot be written to
        parent = parent.parent
    name, token = f".check-{secrets.token_hex(8)}", secrets.token_hex(16)
    name, token = all_gather_objects((name, token))[0]
    place = parent / name
    try:
        seconds, problem = _write(place, token, checkpoint_bytes) if here.is_main else (0.0, None)
        seconds, problem = all_gather_objects((seconds, problem))[0]
        if problem is not None:
            cure = "make it writable, or name another run_folder"
            return [Finding("folder", "failure", f"{_where(here, rank=0)}: {parent}: {problem}", cure)], seconds
        invisible = None if _sees(place / "token", token) else f"{_where(here)}: does not see what rank 0 wrote in {parent}"
        blind = [said for said in all_gather_objects(invisible) if said is not None]
    finally:
        if here.is_main:
            shutil.rmtree(place, ignore_errors=True)
    if blind:
        cure = "run_folder must be on a disk that all nodes share"
        return [Finding("folder", "failure", line, cure) for line in blind], seconds
    speed = checkpoint_bytes / seconds / 2**20
    found = f"{parent} is seen by all ranks; write + fsync {speed:.0f} MiB/s: a checkpoint takes {seconds:.1f} s"
    return [Finding("folder", "ok", found)], seconds


def _write(place: Path, token: str, checkpoint_bytes: float) -> tuple[float, str | None]:
    """(seconds that a checkpoint would take, why it cannot be written)."""
    content = os.urandom(int(min(checkpoint_bytes, _WRITTEN_BYTES)))  # a disk may be quick with zeros
    try:
        place.mkdir()
        begin = time.perf_counter()
        with (place / "content").open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        with (place / "token").open("x") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return 0.0, error.strerror or str(error)
    return seconds * max(1.0, checkpoint_bytes / _WRITTEN_BYTES), None


def _sees(path: Path, token: str) -> bool:
    until = time.monotonic() + _VISIBLE_SECONDS
    while True:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes NFS look again
            if path.read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def _where(here: World, rank: int | None = None) -> str:
    return f"rank {rank}" if rank is not None else f"{socket.gethostname()} (rank {here.rank})"
