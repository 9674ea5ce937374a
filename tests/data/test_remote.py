"""Files from a server that fails in all ways: tried again, then named in one line; and what needs no second try."""

import io
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from simclr_dist.data.remote.fetch import Patience, _from_fsspec, check_url, fetch, is_url, join
from simclr_dist.system.errors import DataError, UnreachableError, redact
from small_shards import Server, serve

QUICK = Patience(seconds=5, stall=0.3, first_wait=0.01, window=0.8)
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "a file").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        yield server


def fetched(url: str, patience: Patience = QUICK, **more: Any) -> bytes:
    target = io.BytesIO()
    assert fetch(url, target, patience=patience, **more) == len(target.getvalue())
    return target.getvalue()


@pytest.mark.parametrize("faults", [[], ["stall"], ["cut"], [500], [503, "cut", 429, "stall", 500, 502], [404], [404, 404]])
@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_what_passes_is_waited_for(server: Server, faults: list[str | int], size: int | None) -> None:
    server.faults["a file"] = list(faults)
    assert fetched(join(server.url, "a file"), size=size) == CONTENT
    assert server.asked["a file"] == len(faults) + 1


def test_a_connection_that_is_refused_is_tried_until_it_is_taken(tmp_path: Path) -> None:
    with serve(tmp_path) as gone:
        url = gone.url
    with pytest.raises(
        UnreachableError, match=r"^http://127.0.0.1:\d+/x: cannot be fetched: Connection refused \((\d+) tries in [^\n]*$"
    ) as caught:
        fetched(f"{url}/x", Patience(seconds=0.5, first_wait=0.01))
    assert int(str(caught.value).rpartition("(")[2].split()[0]) > 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(500, "the server says 500 "), ("stall", r"no byte for 0.1 s"), ("cut", r"the connection ended after 128000 of 256000")],
)
def test_what_does_not_pass_is_named(server: Server, fault: str | int, reason: str) -> None:
    server.faults["a file"] = [fault] * 1000
    with pytest.raises(UnreachableError, match=rf"^{server.url}/a%20file: cannot be fetched: {reason}[^\n]*tries in [^\n]*$"):
        fetched(f"{server.url}/a%20file", Patience(seconds=0.6, stall=0.1, first_wait=0.01))
    assert server.asked["a file"] > 2


@pytest.mark.parametrize(("status", "tries"), [(401, 1), (403, 1), (400, 1), (404, 3), (410, 3)])
def test_what_the_server_means_is_not_asked_for_ever(server: Server, status: int, tries: int) -> None:
    server.faults["a file"] = [status] * 100
    with pytest.raises(UnreachableError, match=f"the server says {status}"):
        fetched(f"{server.url}/a%20file")
    assert server.asked["a file"] == tries


def test_another_size_than_the_manifests(server: Server) -> None:
    with pytest.raises(UnreachableError, match="it has 256000 bytes there, the manifest says 255999"):
        fetched(f"{server.url}/a%20file", size=len(CONTENT) - 1)
    assert server.asked["a file"] == 3
    with pytest.raises(UnreachableError, match="larger than the 100 bytes"):
        fetched(f"{server.url}/a%20file", most=100)


@contextmanager
def speaking(*words: bytes, every: float) -> Iterator[str]:
    """URL of a server that answers each request with these, one `every` so many seconds; then the last again, for 30 s."""
    left = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            for word in words:
                connection.sendall(word)
            enough = time.monotonic() + 30
            while words and time.monotonic() < enough and not left.wait(every):
                connection.sendall(words[-1])

    def accept() -> None:
        threads = []
        while not left.is_set():
            with suppress(TimeoutError):
                threads.append(threading.Thread(target=answer, args=(listening.accept()[0],)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            left.set()
            accepting.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((OK, b"x"), r"too slow: \d\d? bytes in [\d.]+ s, fewer than 1000 a second"),
        ((b"HTTP/1.1 200 OK\r\nX: ", b"y"), "no byte for 0.5 s"),
        ((b"HTTP/1.1 302 Found\r\nLocation: ",), "no byte for 0.5 s"),
        ((CHUNKED, b"z"), "no byte for 0.5 s"),
    ],
    ids=["body", "headers", "redirect", "chunk"],
)
def test_a_server_that_drips_is_given_up(words: tuple[bytes, ...], reason: str) -> None:
    with speaking(*words, every=0.05) as url:
        began = time.monotonic()
        with pytest.raises(UnreachableError, match=rf"^{url}/x: cannot be fetched: {reason} \([2-9] tries in [^\n]*$"):
            fetched(f"{url}/x", Patience(seconds=1, stall=0.4, first_wait=0.01, window=0.5, least=1000), size=1_000_000)
        assert time.monotonic() - began < 10


def test_a_slow_link_brings_all_however_long_it_takes() -> None:
    """For many windows and longer than `seconds`; and to a disk that is slower than a server may be."""
    size = 16_000
    with speaking(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode(), bytes(100), every=0.02) as url:
        patience = Patience(seconds=0.5, stall=5, window=0.5, least=500)
        began = time.monotonic()
        assert fetched(f"{url}/x", patience, size=size) == bytes(size)
        assert time.monotonic() - began > 4 * patience.window

    class Slow(io.BytesIO):
        def write(self, content: Any) -> int:
            time.sleep(0.3)
            return super().write(content)

    with speaking(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", b"x" * 10, every=0.01) as url:
        assert fetch(f"{url}/x", Slow(), patience=Patience(seconds=0.1, window=0.2, least=200)) == 40


def test_the_body_of_a_redirect_is_not_read(server: Server) -> None:
    """urllib would hold all of it in memory."""
    head = f"HTTP/1.1 302 Found\r\nLocation: {server.url}/a%20file\r\n\r\n".encode()
    with speaking(head, bytes(1000), every=0.001) as url:
        assert fetched(f"{url}/x", Patience(seconds=0.1, window=3)) == CONTENT


@pytest.mark.parametrize(("status", "size"), [(206, None), (206, len(CONTENT)), (202, None)])
def test_a_part_that_nobody_asked_for_is_not_the_file(server: Server, status: int, size: int | None) -> None:
    server.faults["a file"] = [f"as {status}"] * 2
    assert fetched(f"{server.url}/a%20file", size=size) == CONTENT, "the third try is answered with 200"
    server.faults["a file"] = [f"as {status}"] * 100
    with pytest.raises(UnreachableError, match=rf"the server says {status} [A-Z][^\n]*, which is not the whole file \(3 tries"):
        fetched(f"{server.url}/a%20file", size=size)


@pytest.mark.parametrize(
    ("leads_to", "says"),
    [
        ("ftp://127.0.0.1:1/x?token=secret", "302 and leads to another protocol, which is not followed"),
        ("file:///etc/hostname?token=secret", r"302 Found - Redirection to url 'file:///etc/hostname\?\*\*\*"),
    ],
)
def test_a_redirect_to_another_protocol_is_not_followed(leads_to: str, says: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", leads_to)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        answering = threading.Thread(target=http.handle_request)
        answering.start()
        with pytest.raises(UnreachableError, match=rf"x: cannot be fetched: the server says {says}$"):
            fetched(f"http://127.0.0.1:{http.server_address[1]}/x")
        answering.join()


def test_a_host_that_is_none() -> None:
    with pytest.raises(UnreachableError, match=r"^http://127.0.0.1:nonsense/x: cannot be fetched: [^\n]+$"):
        fetched("http://127.0.0.1:nonsense/x")


def test_a_login_is_taken_from_netrc_and_not_from_the_url(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetched(f"{server.url}/a%20file") == CONTENT
    assert server.headers[-1]["Authorization"] == "Basic bWU6c2VjcmV0"
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    assert fetched(f"{server.url}/a%20file") == CONTENT
    assert "Authorization" not in server.headers[-1], "a default is for no host in particular"
    for url in (
        "https://me:secret@host/x",
        "https://host/x?token=secret",
        "https://host/x#token=secret",
        "s3://key:secret@bucket/x",
    ):
        with pytest.raises(DataError, match=r"must hold no user, password, query or fragment[^\n]*$") as caught:
            check_url(url)
        assert "secret" not in str(caught.value)


def test_redact() -> None:
    assert redact("https://me:a@b@host/x?sig=1#y") == "https://***@host/x?***"
    assert redact("https://host/x#token=1?2") == "https://host/x#***"
    for password in ("pa/ss", "/pass", "p?ss", "p#ss", "p ss", "p\nss", "a/@b", "123456/ss"):
        for user in ("me", ""):
            assert redact(f"http://{user}:{password}x@host/x") == "http://***@host/x"
            assert redact(f"http://{user}:{password}x@host:80/x@y") in ("http://***@host:80/x@y", "http://***@y")
            with pytest.raises(DataError, match="must hold no user"):
                check_url(f"http://{user}:{password}x@host/x")
    for plain in ("https://host/x@y", "https://host:8080/x@y", "http://host:80", "http://[::1]:80/x@y", "http://[::1]/x@y"):
        assert redact(plain) == plain
        check_url(plain)
    assert redact("pipe:curl http://host:80/x | ssh me@there") == "pipe:curl http://host:80/x | ssh me@there"
    assert redact("/local/x#1") == "/local/x#1"
    assert is_url("s3://b/x")
    assert not is_url("/a/b://c")
    assert not is_url(Path("http://x"))


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://bucket/x", r"s3://bucket/x: s3:// needs a package that is not installed: pip install s3fs"),
        ("gs://bucket/x", r"gs:// needs a package that is not installed: pip install gcsfs"),
        ("nothing://x", r"nothing:// is not a protocol that fsspec knows"),
        ("zip://x::http://127.0.0.1/y", r"chained URLs are not read"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_one_line(url: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"{line}[^\n]*$"):
        check_url(url)


class Faulty(MemoryFileSystem):  # type: ignore[misc]
    """A protocol that fails as often as it is told."""

    protocol = "faulty"
    failures: ClassVar[list[Exception | float]] = []
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))
        return stripped

    def _open(self, *args: Any, **more: Any) -> Any:
        Faulty.opened += 1
        if Faulty.failures:
            if isinstance(fault := Faulty.failures.pop(0), float):
                time.sleep(fault)
            else:
                raise fault
        return super()._open(*args, **more)


@pytest.fixture
def faulty() -> Iterator[types.SimpleNamespace]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.failures = []
    Faulty().pipe_file("/folder/x y", CONTENT)
    Faulty.opened = 0
    yield types.SimpleNamespace(url="faulty://folder/x y", of=Faulty)
    Faulty().rm("/folder", recursive=True)


def test_any_protocol_of_fsspec(faulty: Any) -> None:
    faulty.of.failures = [OSError("reset"), 2.0, RuntimeError("the package's own")]
    assert fetched(faulty.url, size=len(CONTENT)) == CONTENT
    assert faulty.of.opened == 4
    faulty.of.failures = [PermissionError("no"), FileNotFoundError("x")]
    with pytest.raises(UnreachableError, match=r"^faulty://folder/x y: cannot be fetched: access is denied"):
        fetched(faulty.url)
    faulty.of.failures = [FileNotFoundError("x")] * 3
    with pytest.raises(UnreachableError, match=r"it is not there"):
        fetched(faulty.url)
    faulty.of.failures = [ValueError("never")] * 1000
    with pytest.raises(UnreachableError, match=r"never \(\d+ tries"):
        fetched(faulty.url, Patience(seconds=0.3, first_wait=0.01))


def test_blocks_are_small_on_a_slow_link_and_large_on_a_fast_one(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package brings each block whole: one of 50 MiB at 1 MB/s is more than `stall`."""
    now, asked, content = 0.0, [], bytes(100 << 20)
    faulty.of().pipe_file("/folder/large", content)
    read = io.BytesIO.read

    class Link(io.BytesIO):
        speed = 1e6

        def read(self, size: int | None = -1) -> bytes:
            nonlocal now
            asked.append(size)
            now += len(got := read(self, size)) / self.speed
            return got

    monkeypatch.setattr(faulty.of, "_open", lambda *_, **more: opened.append(more["block_size"]) or Link(content))
    monkeypatch.setattr("simclr_dist.data.remote.fetch.time.monotonic", lambda: now)
    for speed, largest in ((1e5, 1 << 20), (2e6, 2 << 20), (1e9, 16 << 20)):
        Link.speed, opened = speed, []
        asked.clear()
        assert sum(map(len, _from_fsspec("faulty://folder/large", 20))) == len(content)
        assert (max(asked), opened) == (largest, [1 << 18])


def test_a_folder_by_url(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    assert fetched(join(tmp_path.as_uri(), "x")) == CONTENT
