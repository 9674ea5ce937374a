"""Check a config's shards and run folder. Call on all ranks; all get the same findings. No file stays."""

import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from simclr_dist.config.settings import Config
from simclr_dist.config.together import doubts
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.remote.cache import cache_settings
from simclr_dist.method.distributed import World, all_gather_objects
from simclr_dist.preflight.check.findings import Finding, place_of
from simclr_dist.run.folder import check_room, check_run_folder, existing_part, newest_step, stored_config
from simclr_dist.system.errors import ConfigError, DataError, UserError, reason_of
from simclr_dist.system.files import write_atomically
from simclr_dist.train.describe import rate_doubt, view_settings
from simclr_dist.train.inputs import check_inputs

_SAMPLES = 64  # images that each rank reads and compares with their sha256
_WRITTEN_BYTES = 64 * 2**20
_VISIBLE_SECONDS = 10.0  # network disks show new files late


def shards(config: Config, world: World) -> list[Finding]:
    """Check that all ranks see one manifest and whole images (by sha256). Also what else `train` reads."""
    problem, misfit, images, digest, rate, read = None, None, None, "", 0.0, 0
    try:
        misfit = _misfit(config, world)
        if config.data.reader == "manifest":
            cache = cache_settings(config.data.cache, config.data.cache_gib)
            images = ShardDataset(config.data.shards, open_shards=4, cache=cache)
            digest = images.manifest.digest
            read, rate = _read(images, np.random.default_rng([config.seed, world.rank]))
    except (DataError, ConfigError) as error:
        problem = f"{place_of(world.rank)}: {error}"
    except OSError as error:
        problem = f"{place_of(world.rank)}: {error.filename or config.data.shards}: {error.strerror}"
    problems, misfits, digests, rates = zip(*all_gather_objects((problem, misfit, digest, rate)), strict=True)
    if lines := sorted({problem for problem in problems if problem is not None}):
        cure = "every node needs all shards, whole and readable: copy them anew, or put them on a shared disk"
        return [Finding("shards", "failure", line, cure) for line in lines]
    if len(set(digests)) > 1:
        return [Finding("shards", "failure", f"{config.data.shards}: not the same images on every rank", "copy them anew")]
    if lines := sorted({misfit for misfit in misfits if misfit is not None}):
        return [Finding("shards", "failure", line, "nothing is wrong with the shards: change that setting") for line in lines]
    if images is None:
        line, cure = "a stream has no manifest to compare with", "`simclr-dist shard --index` writes one"
        return [Finding("shards", "warning", line, cure)]
    side, short_side, on_cpu = view_settings(config).image_size, images.manifest.short_side, world.device.type == "cpu"
    doubted = doubts(config, len(images), world.size, side, short_side, on_cpu=on_cpu)
    return [
        Finding("shards", "ok", f"{read} images a rank are whole; the slowest rank reads {min(rates):.0f} MiB/s"),
        *(Finding("shards", "warning", doubt) for doubt in doubted),
    ]


def _misfit(config: Config, world: World) -> str | None:
    """Say which setting does not fit what is there."""
    try:
        check_inputs(config, world.size)
    except ConfigError as error:
        return str(error)
    return None


def _read(images: ShardDataset, random: np.random.Generator) -> tuple[int, float]:
    """Read some images. Returns (their number, MiB a second)."""
    first, count = 0, len(images)
    if isinstance(images.manifest.folder, str):  # a URL: fetch one shard into the cache, not all
        shard = random.integers(len(images.manifest.shards))
        count = int(images.manifest.shard_sizes[shard])
        first = int(images.manifest.shard_ends[shard]) - count
    read = min(_SAMPLES, count)
    begin = time.perf_counter()
    size = sum(len(images.read(first + int(row))) for row in random.choice(count, read, replace=False))
    return read, size / (time.perf_counter() - begin) / 2**20


def folder(config: Config, world: World, checkpoint_bytes: float, encoder_bytes: float) -> tuple[list[Finding], float]:
    """Check that all ranks see the run folder, with room. Returns (findings, seconds of a checkpoint)."""
    parent = existing_part(Path(config.run_folder)).absolute()
    names = f".check-{secrets.token_hex(8)}", secrets.token_hex(16)
    name, token = all_gather_objects(names)[0]
    place = parent / name
    try:
        seconds, problem = _write(place, token, checkpoint_bytes) if world.is_main else (0.0, None)
        seconds, problem = all_gather_objects((seconds, problem))[0]
        if problem is not None:
            cure = "make it writable, or name another run_folder"
            return [Finding("folder", "failure", f"rank 0: {parent}: {problem}", cure)], seconds
        blind = None if _sees(place / "token", token) else place_of(world.rank)
        blind_ranks = [rank for rank in all_gather_objects(blind) if rank is not None]
    finally:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)
    if blind_ranks:
        line, cure = f"does not see what rank 0 wrote in {parent}", "run_folder must be on a disk that all nodes share"
        return [Finding("folder", "failure", f"{rank}: {line}", cure) for rank in blind_ranks], seconds
    speed = checkpoint_bytes / seconds / 2**20
    line = f"{parent} is seen by all ranks; write + fsync {speed:.0f} MiB/s: a checkpoint takes {seconds:.1f} s"
    amiss = _as_train_says(config, world.size, checkpoint_bytes, encoder_bytes) if world.is_main else []
    return all_gather_objects(amiss)[0] or [Finding("folder", "ok", line)], seconds


def _as_train_says(config: Config, ranks: int, checkpoint_bytes: float, encoder_bytes: float) -> list[Finding]:
    """List what `train` would refuse of the run folder, or warn of."""
    run = Path(config.run_folder)
    try:
        before = stored_config(run) if check_run_folder(config, held=True) else None
        samples = check_inputs(config, ranks)
        check_room(config, config.total_steps(samples), checkpoint_bytes, encoder_bytes)
    except UserError as error:
        return [Finding("folder", "failure", str(error), "`train` refuses it with this line")]
    doubt = before and rate_doubt(before, config, samples, newest_step(run))
    return [Finding("folder", "warning", doubt)] if doubt else []


def _write(place: Path, token: str, checkpoint_bytes: float) -> tuple[float, str | None]:
    """Return (seconds that a checkpoint would take, why it cannot be written)."""
    content = os.urandom(int(min(checkpoint_bytes, _WRITTEN_BYTES)))  # a disk may be quick with zeros
    try:
        place.mkdir()
        begin = time.perf_counter()
        write_atomically(place / "content", content)
        seconds = time.perf_counter() - begin
        write_atomically(place / "token", token.encode())
    except OSError as error:
        return 0.0, reason_of(error)
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
