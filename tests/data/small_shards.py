"""Shards of tiny pictures, written in a moment; and a server on loopback that gives them out, with faults on request."""

import hashlib
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from simclr_dist.data.manifest import ManifestRow, write_manifest

SIDE = 8


@cache
def png(number: int) -> bytes:
    """A picture of 8x8 pixels of its own colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> dict[str, int]:
    """A plain tar; returns where each member's bytes begin."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    with tarfile.open(path, "r:") as tar:
        return {member.name: member.offset_data for member in tar}


def write_small_shards(folder: Path, sizes: Sequence[int], *, bad: Sequence[int] = (), padding: int = 0) -> Path:
    """Tars of `sizes` pictures (label: number % 3) with their manifest; the rows in `bad` have other bytes than it says.

    `padding` bytes at the end of each tar make it larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, number = [], 0
    for shard, size in enumerate(sizes):
        name = f"train-{shard:06d}.tar"
        numbers = range(number, number + size)
        offsets = write_tar(folder / name, [(f"{k:06d}.png", bytes(len(png(k))) if k in bad else png(k)) for k in numbers])
        with (folder / name).open("ab") as file:
            file.write(bytes(padding))
        for k in numbers:
            content = png(k)
            digest = hashlib.sha256(content).digest()
            rows.append(ManifestRow(f"{k:06d}", name, offsets[f"{k:06d}.png"], len(content), k % 3, SIDE, SIDE, digest))
        number += size
    write_manifest(folder, [f"train-{shard:06d}.tar" for shard in range(len(sizes))], rows, ())
    return folder


class Server:
    """Serves a folder. `faults[name]` is a list with what goes wrong at each next request for that file; [] is nothing.

    `stall`: half of it, then no byte; `cut`: half, then the connection ends; `wrong`: all bytes, each another; `as 206`: all
    of it under that status; a number: that status as an error. `asked` counts requests by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str | int]] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[Any] = []
        self.most_at_once = 0
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.released = threading.Event()
        self.slow = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = unquote(urlsplit(self.path).path).lstrip("/")
                with server._lock:
                    server.asked[name] += 1
                    server._now[name] += 1
                    server.most_at_once = max(server.most_at_once, server._now[name])
                    server.headers.append(self.headers)
                    fault = server.faults[name].pop(0) if server.faults.get(name) else None
                try:
                    self.answer(folder / name, fault)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server._lock:
                        server._now[name] -= 1

            def answer(self, path: Path, fault: str | int | None) -> None:
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                content = path.read_bytes()
                if fault == "wrong":
                    content = bytes(255 - byte for byte in content)
                self.send_response(int(fault[3:]) if fault and fault.startswith("as ") else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if server.slow:
                    server.released.wait(server.slow)
                if fault in ("stall", "cut"):
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        server.released.wait(30)
                    self.close_connection = True
                    return
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server of that folder, gone at the end."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()
