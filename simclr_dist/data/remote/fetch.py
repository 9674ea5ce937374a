"""Bytes from a server: http and https by the standard library, every other protocol by fsspec; tried again when it fails.

A fetch goes on trying through refused and cut connections, stalls, trickles and errors of the server (5xx, 429) until
`Patience` is used up, then names the URL. What waiting cannot cure (denied, not there, not a protocol) is named at once.
"""

import base64
import http.client
import netrc
import queue
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from simclr_dist.system.errors import DataError, UnreachableError, printable, redact

_CHUNK = 1 << 20
_LARGEST_BLOCK = 16 << 20
_FEW = 3  # tries at what is probably as the server says: not there, or of another size
_MOST_WAIT = 30.0
_PASSING = (408, 425, 429)
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Patience:
    """How long a failing server is asked again, `seconds` in all, and when a try has failed; all in seconds.

    It has when the first byte takes longer than `window`, when `stall` pass without a byte, and when in `window` fewer than
    `least` bytes a second have come. Nothing else ends a try, however long it takes: a slow link that is faster than this
    brings a shard of any size.
    """

    seconds: float = 180.0
    stall: float = 20.0
    first_wait: float = 0.5
    window: float = 60.0
    least: float = 10_000.0


class _FailedError(Exception):
    """One try. `tries`: how many of this kind are enough (None: as many as there is time for)."""

    def __init__(self, reason: str, tries: int | None = None) -> None:
        super().__init__(reason)
        self.tries = tries


def is_url(where: object) -> bool:
    """Whether a text names a place by protocol, like https://host/folder."""
    return isinstance(where, str) and _URL.match(where) is not None


def has_secret(url: str) -> bool:
    """Whether the URL has a part that `redact` takes away."""
    return redact(url) != url


def join(base: str, name: str) -> str:
    """The URL of a file in the folder `base`."""
    return f"{base}/{quote(name) if _is_http(base) else name}"


def fetch(
    url: str,
    into: BinaryIO,
    *,
    size: int | None = None,
    most: int | None = None,
    patience: Patience | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Write the file at `url` to `into`, from its place 0 on, and return the number of bytes.

    `size` is what it must have, if known; `most` what it may have. `stopped` ends the waiting between tries. Raises
    UnreachableError, one line with the URL, when the server fails for longer than `patience`; OSError when `into` takes no
    more.
    """
    patience = patience or Patience()
    began, wait, few = time.monotonic(), patience.first_wait, 0
    for tries in range(1, 1_000_000):  # pragma: no branch
        into.seek(0)
        try:
            count = _copy(url, into, size, most, patience)
            into.truncate(count)  # a try before may have been longer
            return count
        except _FailedError as error:
            few += error.tries is not None
            over = error.tries is not None and few >= error.tries
            if over or stopped() or time.monotonic() - began + wait > patience.seconds:
                how = f" ({tries} tries in {time.monotonic() - began:.0f} s)" if tries > 1 else ""
                raise UnreachableError(f"{redact(url)}: cannot be fetched: {error}{how}") from None
        time.sleep(wait * random.uniform(0.5, 1))
        wait = min(2 * wait, _MOST_WAIT)
    raise AssertionError("unreachable")


def _copy(url: str, into: BinaryIO, size: int | None, most: int | None, patience: Patience) -> int:
    count = 0
    chunks = _from_http(url, size, patience.stall) if _is_http(url) else _from_fsspec(url, patience.stall)
    for chunk in _in_time(chunks, patience):
        count += len(chunk)
        limit = size if size is not None else most
        if limit is not None and count > limit:
            raise _FailedError(f"it is larger than the {limit} bytes that it should have at most", _FEW)
        into.write(chunk)
    if size is not None and count != size:
        raise _FailedError(f"it ends after {count} of {size} bytes")
    return count


def _in_time(chunks: Generator[bytes], patience: Patience) -> Iterator[bytes]:
    """The chunks, made in a thread of its own: protocols wait for hours, and http's timeouts begin anew with each byte."""
    made: queue.Queue[bytes | Exception] = queue.Queue(maxsize=2)
    left = threading.Event()

    def put(item: bytes | Exception) -> bool:
        while not left.is_set():
            try:
                made.put(item, timeout=0.5)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            with closing(chunks):
                for chunk in chunks:
                    if not put(chunk):
                        return
            put(b"")
        except Exception as error:
            put(error)
            if not isinstance(error, _FailedError):
                raise

    def get(most: float) -> bytes:
        try:
            item = made.get(timeout=most)
        except queue.Empty:
            raise _FailedError(f"no byte for {most:g} s") from None
        if isinstance(item, Exception):
            raise item
        return item

    threading.Thread(target=make, daemon=True).start()
    try:
        chunk = get(patience.window)
        came, waited = 0, 0.0  # only waiting counts: what the disk takes is not the server's fault
        while chunk:
            yield chunk
            began = time.monotonic()
            chunk = get(patience.stall)
            waited += time.monotonic() - began
            came += len(chunk)
            if waited >= patience.window:
                if came < patience.least * waited:
                    raise _FailedError(f"too slow: {came} bytes in {waited:.3g} s, fewer than {patience.least:g} a second")
                came, waited = 0, 0.0
    finally:
        left.set()


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _from_http(url: str, size: int | None, stall: float) -> Generator[bytes]:
    # Identity: bytes are counted and stand at offsets.
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "simclr-dist"})
    if (login := _netrc_login(url)) is not None:
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=stall) as answer:
            if answer.status != 200:  # 206, say, is a part of the file, which nobody has asked for
                said = printable(redact(answer.reason or ""))
                raise _FailedError(f"the server says {answer.status} {said}".rstrip() + ", which is not the whole file", _FEW)
            told = answer.headers.get("Content-Length")
            if size is not None and told is not None and told.isdecimal() and int(told) != size:
                raise _FailedError(f"it has {told} bytes there, the manifest says {size}", _FEW)
            count = 0
            while chunk := answer.read1(_CHUNK):  # read would wait for all of it, through any number of stalls
                count += len(chunk)
                yield chunk
            if told is not None and told.isdecimal() and count != int(told):
                raise _FailedError(f"the connection ended after {count} of {told} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        kind = {404: _FEW, 410: _FEW}.get(error.code, 1 if error.code < 500 and error.code not in _PASSING else None)
        # What it says may be an address that it leads to, with a token in it, or some lines.
        said = redact((str(error.reason).splitlines() or [""])[0])
        raise _FailedError(f"the server says {error.code} {printable(said)}".rstrip(), kind) from None
    except urllib.error.URLError as error:
        final = 1 if isinstance(error.reason, ssl.SSLCertVerificationError) or "unknown url type" in str(error.reason) else None
        raise _FailedError(_told(error.reason, stall), final) from None
    except (http.client.InvalidURL, ValueError) as error:  # of a port that is no number, a host that is no name
        raise _FailedError(_told(error, stall), 1) from None
    except (OSError, http.client.HTTPException) as error:
        raise _FailedError(_told(error, stall)) from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib would also follow one to ftp."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read all that comes with it, and a server may send without end
        if not _is_http(newurl):
            raise urllib.error.HTTPError(newurl, code, "and leads to another protocol, which is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _netrc_login(url: str) -> str | None:
    """user:password for the URL's host from ~/.netrc; None without an entry."""
    try:
        entry = netrc.netrc().hosts.get(urlsplit(url).hostname or "")  # authenticators() would send `default`'s to any host
    except (OSError, netrc.NetrcParseError):
        return None
    return f"{entry[0]}:{entry[2]}" if entry else None


def _from_fsspec(url: str, stall: float) -> Generator[bytes]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
        # Packages bring a block whole, with one more behind it, of 50 MiB by default: a slow link would seem to stall.
        with filesystem.open(path, "rb", block_size=_CHUNK // 4) as file:
            length, began = _CHUNK, time.monotonic()
            while chunk := file.read(length):
                took = time.monotonic() - began
                yield chunk
                length = min(2 * length, _LARGEST_BLOCK) if took < 1 else max(length // 2, _CHUNK)
                began = time.monotonic()
    except Exception as error:  # a protocol's package has errors of its own; every one is passed on
        raise _of_fsspec(url, error, stall) from None


def _of_fsspec(url: str, error: Exception, stall: float) -> _FailedError:
    if isinstance(error, ImportError | ValueError) and (missing := missing_package(url)) is not None:
        return _FailedError(missing, 1)
    if isinstance(error, FileNotFoundError):
        return _FailedError("it is not there", _FEW)
    if isinstance(error, PermissionError):
        return _FailedError(f"access is denied ({_told(error, stall)})", 1)
    return _FailedError(_told(error, stall))


def missing_package(url: str) -> str | None:
    """What to install for a URL's protocol, or that there is no such protocol; None when it can be used."""
    protocol = url.partition("://")[0].lower()
    if _is_http(url):
        return None
    from fsspec.registry import get_filesystem_class, known_implementations

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        cure = f"pip install {package.replace('_', '-')}" if package != "fsspec" else str(error)
        return f"{protocol}:// needs a package that is not installed: {cure}"
    except ValueError:
        return f"{protocol}:// is not a protocol that fsspec knows"
    return None


def check_url(url: str) -> None:
    """Raises DataError for a URL that cannot be read, or must not be written down, as it is."""
    if has_secret(url):
        # It would stand in config.yaml, in checkpoints and in the card of every encoder.
        raise DataError(
            f"{redact(url)}: a URL must hold no user, password, query or fragment, as it is written into the run's files; "
            "put a login into ~/.netrc, or where the protocol's package looks for it"
        )
    if "::" in url:
        raise DataError(f"{redact(url)}: chained URLs are not read; name the folder that holds the shards")
    if (missing := missing_package(url)) is not None:
        raise DataError(f"{redact(url)}: {missing}")


def _told(error: object, stall: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte for {stall:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(redact((str(error).splitlines() or [""])[0])) or type(error).__name__
