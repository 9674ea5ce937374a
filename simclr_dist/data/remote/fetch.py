"""Fetch bytes from a server, and try again when it fails. http and https use the standard library, other protocols fsspec.

A fetch tries again after refused and cut connections, stalls, trickles and errors of the server (5xx, 429) until
`Patience` is used up, then names the URL. What waiting cannot cure (denied, not there, not a protocol) is reported at once.
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
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from simclr_dist.system.errors import DataError, UnreachableError, printable, reason_of, redact

_CHUNK = 1 << 20
_LARGEST_BLOCK = 16 << 20
_FEW = 3  # tries where the server is probably right: the file is not there, or has another size
_MOST_WAIT = 30.0
_PASSING = (408, 425, 429)
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Patience:
    """The patience with a failing server. It is tried again for `seconds` in all. All values are in seconds.

    A try fails when the first byte takes longer than `window`, when `stall` pass without a byte, and when in `window` fewer
    than `least` bytes a second have come. Nothing else ends it: a slow link that is faster brings a shard of any size.
    """

    seconds: float = 180.0
    stall: float = 20.0
    first_wait: float = 0.5
    window: float = 60.0
    least: float = 10_000.0


class _FailedError(Exception):
    """A failed try. After `tries` of its kind no more follow (None: as long as there is time)."""

    def __init__(self, reason: str, tries: int | None = None) -> None:
        super().__init__(reason)
        self.tries = tries


def is_url(where: object) -> bool:
    """Tell whether a text names a place by protocol, like https://host/folder."""
    return isinstance(where, str) and _URL.match(where) is not None


def join(base: str, name: str) -> str:
    """Build the URL of a file in the folder `base`."""
    return f"{base}/{quote(name) if _is_http(base) else name}"


def fetch(
    url: str, into: BinaryIO,
    *, size: int | None = None, most: int | None = None,
    patience: Patience | None = None, stopped: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Write the file at `url` to `into`, from its place 0 on. Returns the number of bytes.

    `size` is the size it must have, if known; `most` is the largest allowed. `stopped` ends the waiting between tries. Raises
    UnreachableError when the server fails for longer than `patience`, and OSError when `into` takes no more.
    """
    patience = patience or Patience()
    began, wait, few = time.monotonic(), patience.first_wait, 0
    for tries in range(1, 1_000_000):  # pragma: no branch
        into.seek(0)
        try:
            count = _copy(url, into, size, most, patience)
            into.truncate(count)  # an earlier try may have written more
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
    """Read the chunks in their own thread. Protocols may wait for hours, and http's timeouts start again at each byte."""
    ready: queue.Queue[bytes | Exception] = queue.Queue(maxsize=2)
    left = threading.Event()

    def make() -> None:
        try:
            with closing(chunks):
                for chunk in chunks:
                    ready.put(chunk)
                    if left.is_set():
                        return
            ready.put(b"")
        except Exception as error:  # the reader raises it, in its own thread
            ready.put(error)
            if not isinstance(error, _FailedError):
                raise

    def get(most: float) -> bytes:
        try:
            item = ready.get(timeout=most)
        except queue.Empty:
            raise _FailedError(f"no byte for {most:g} s") from None
        if isinstance(item, Exception):
            raise item
        return item

    threading.Thread(target=make, daemon=True).start()
    try:
        chunk = get(patience.window)
        came, waited = 0, 0.0  # only waiting counts: time for the disk is not the server's fault
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
        with suppress(queue.Empty):  # then the thread puts no more than two, for which there is room
            while True:
                ready.get_nowait()


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
                raise _FailedError(f"{_answer(answer.status, answer.reason or '')}, which is not the whole file", _FEW)
            length = answer.headers.get("Content-Length")
            if size is not None and length is not None and length.isdecimal() and int(length) != size:
                raise _FailedError(f"it has {length} bytes there, the manifest says {size}", _FEW)
            count = 0
            while chunk := answer.read1(_CHUNK):  # read would wait for all of it, through any number of stalls
                count += len(chunk)
                yield chunk
            if length is not None and length.isdecimal() and count != int(length):
                raise _FailedError(f"the connection ended after {count} of {length} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        kind = {404: _FEW, 410: _FEW}.get(error.code, 1 if error.code < 500 and error.code not in _PASSING else None)
        raise _FailedError(_answer(error.code, str(error.reason)), kind) from None
    except urllib.error.URLError as error:
        final = 1 if isinstance(error.reason, ssl.SSLCertVerificationError) or "unknown url type" in str(error.reason) else None
        raise _FailedError(_why(error.reason, stall), final) from None
    except (http.client.InvalidURL, ValueError) as error:  # a port that is no number, a host that is no name
        raise _FailedError(_why(error, stall), 1) from None
    except (OSError, http.client.HTTPException) as error:
        raise _FailedError(_why(error, stall)) from None


def _answer(code: int, reason: str) -> str:
    # The reason may be an address that the server leads to, with a token in it, or some lines.
    return f"the server says {code} {printable(redact((reason.splitlines() or [''])[0]))}".rstrip()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none to ftp. urllib would."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read the whole answer, and a server may send without end
        if not _is_http(newurl):
            raise urllib.error.HTTPError(newurl, code, "and leads to another protocol, which is not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _netrc_login(url: str) -> str | None:
    """Read user:password for the URL's host from ~/.netrc. Returns None without an entry."""
    try:
        entry = netrc.netrc().hosts.get(urlsplit(url).hostname or "")  # authenticators() would send `default`'s to any host
    except (OSError, netrc.NetrcParseError):
        return None
    return f"{entry[0]}:{entry[2]}" if entry else None


def _from_fsspec(url: str, stall: float) -> Generator[bytes]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
        # Packages fetch whole blocks and one more ahead, of 50 MiB by default: a slow link would seem to stall.
        with filesystem.open(path, "rb", block_size=_CHUNK // 4) as file:
            length, began = _CHUNK, time.monotonic()
            while chunk := file.read(length):
                took = time.monotonic() - began
                yield chunk
                length = min(2 * length, _LARGEST_BLOCK) if took < 1 else max(length // 2, _CHUNK)
                began = time.monotonic()
    except FileNotFoundError:
        raise _FailedError("it is not there", _FEW) from None
    except PermissionError as error:
        raise _FailedError(f"access is denied ({_why(error, stall)})", 1) from None
    except Exception as error:  # a protocol's package has errors of its own; every one is passed on
        missing = missing_package(url) if isinstance(error, ImportError | ValueError) else None
        raise _FailedError(missing or _why(error, stall), 1 if missing else None) from None


def missing_package(url: str) -> str | None:
    """Say what a URL's protocol lacks: a package, or its existence. Returns None when it can be used."""
    if _is_http(url):
        return None
    protocol = url.partition("://")[0].lower()
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
    """Refuse a URL that cannot be read or must not be stored. Both mean the URL as it is written. Raises DataError."""
    if redact(url) != url:
        # It would stand in config.yaml, in checkpoints and in the card of every encoder.
        raise DataError(
            f"{redact(url)}: a URL must hold no user, password, query or fragment, as it is written into the run's files; "
            "put a login into ~/.netrc, or where the protocol's package looks for it"
        )
    if "::" in url and not _is_http(url):  # there it is a host of IPv6
        raise DataError(f"{redact(url)}: chained URLs are not read; name the folder that holds the shards")
    if (missing := missing_package(url)) is not None:
        raise DataError(f"{redact(url)}: {missing}")


def _why(error: object, stall: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no byte for {stall:g} s"
    return printable(redact(reason_of(error)))
