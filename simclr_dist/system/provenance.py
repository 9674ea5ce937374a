"""Describe a run's code: version, git revision, changes, and packages."""

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from simclr_dist import __version__
from simclr_dist.system.files import write_atomically

_PACKAGE = Path(__file__).parents[1]


class Revision(NamedTuple):
    """The `commit` of a git checkout, and whether code has `changed` since."""

    commit: str
    changed: bool


def revision() -> Revision | None:
    """Return the revision of this package's checkout. None for an installed package."""
    commit = _git("rev-parse", "HEAD")
    if commit is None or _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return Revision(commit.decode().strip(), bool(_git("status", "--porcelain", "--", str(_PACKAGE))))


def code_state(run: Path) -> dict[str, Any]:
    """Describe the code, and write changes since the revision into `run`/code.

    Keys: `version`, `revision`, `diff` (path of that file below `run`, or None), and `untracked` (the package's files that
    the revision does not hold).
    """
    state: dict[str, Any] = {"version": __version__, "revision": None, "diff": None, "untracked": []}
    checkout = revision()
    if checkout is None:
        return state
    state["revision"] = checkout.commit
    state["untracked"] = (_git("ls-files", "--others", "--exclude-standard") or b"").decode().splitlines()
    if changed := _git("diff", "HEAD", "--", str(_PACKAGE)):
        path = run / "code" / f"{hashlib.sha256(changed).hexdigest()[:16]}.diff"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, changed)
        state["diff"] = str(path.relative_to(run))
    return state


def packages() -> dict[str, str]:
    """List the versions of all installed distributions."""
    return dict(sorted((dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions()))


def _git(*arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *arguments], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
