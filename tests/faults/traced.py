"""What a program asked of the disk and in which order, from strace."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_CALLS = ("write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat")
# 4242 fsync(3</run/a>) = 0        4242 rename("/run/a", "/run/b") = 0        4242 write(3</run/a>, ""..., 10) = 10
_LINE = re.compile(r"(?P<process>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_PATH = re.compile(r'\d<(/[^>]*)>|"(/[^"]*)"')


def why_not() -> str:
    """Why no program can be traced here, in a line; empty where one can be."""
    if shutil.which("strace") is None:
        return "not installed: strace"
    tried = subprocess.run(["strace", "--output=/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"tracing is not allowed here: {tried.stderr.strip().splitlines()[0]}"


def disk_calls(command: Sequence[str], folder: Path, log: Path) -> list[tuple[str, ...]]:
    """Run `command`, which must succeed; the calls that changed `folder`, as (call, names of the files), repetitions once."""
    subprocess.run(
        [
            *("strace", "--follow-forks", "--seccomp-bpf", "--decode-fds=path", "--string-limit=0", f"--output={log}"),
            *(f"--trace={','.join(_CALLS)}", *command),
        ],
        check=True,
    )
    return parse(log.read_text(), folder)


def parse(log: str, folder: Path) -> list[tuple[str, ...]]:
    """The calls in strace's output that succeeded and concern `folder` or what is in it."""
    found: list[tuple[str, ...]] = []
    begun: dict[str, str] = {}
    for line in log.splitlines():
        process, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
            continue
        if resumed := re.search(r"<\.\.\. \w+ resumed>", line):
            line = begun.pop(process) + line[resumed.end() :]
        match = _LINE.fullmatch(line.strip())
        if match is None or int(match["result"]) < 0:
            continue
        paths = [Path(at or quoted) for at, quoted in _PATH.findall(match["arguments"])]
        if any(path == folder or folder in path.parents for path in paths):
            call = (match["call"], *(path.name for path in paths))
            if found[-1:] != [call]:
                found.append(call)
    return found
