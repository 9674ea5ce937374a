"""Images without a daemon: buildah with a store of its own in a folder, and commands that run by chroot."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def why_not(*more: str) -> str:
    """Why images cannot be built here, in a line; empty where they can be. `more` programs are needed too."""
    if os.geteuid() != 0:
        return "building an image by chroot needs root"
    missing = [program for program in ("buildah", *more) if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Container:
    """A container of an image; `run` is a command in it, as the image's user."""

    def __init__(self, store: "Store", name: str, volumes: Sequence[str]) -> None:
        self._store, self._name = store, name
        self._volumes = [f"--volume={volume}" for volume in volumes]

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Its exit code and its output, stderr with stdout. A program that a volume holds needs its whole path."""
        return self._store.buildah("run", "--isolation=chroot", *self._volumes, self._name, "--", *command, check=False)


class Store:
    """Images and containers below `folder`, in plain copies (vfs), which need nothing of the kernel."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def buildah(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`buildah ARGUMENTS` on this store; AssertionError with what it said when it fails."""
        place = [f"--root={self._folder / 'images'}", f"--runroot={self._folder / 'run'}"]
        done = subprocess.run(
            ["buildah", "--storage-driver=vfs", *place, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(self._folder)},
            check=False,
        )
        assert not check or done.returncode == 0, f"buildah {' '.join(arguments)}: {done.stdout[-4000:]}"
        return done

    def base(self, name: str, root: Path, environment: Mapping[str, str] | None = None) -> None:
        """An image that holds the files below `root`, as it would come from a registry."""
        context = self._folder / "base"
        context.mkdir()
        subprocess.run(["tar", "-C", str(root), "-cf", str(context / "base.tar"), "."], check=True)
        lines = ["FROM scratch", "ADD base.tar /", *(f'ENV {key}="{value}"' for key, value in (environment or {}).items())]
        (context / "Dockerfile").write_text("\n".join(lines) + "\n")
        self.buildah("bud", "--isolation=chroot", "--format=docker", f"--tag={name}", str(context))
        shutil.rmtree(context)

    def build(
        self,
        name: str,
        base: str,
        *,
        arguments: Mapping[str, str] | None = None,
        secrets: Mapping[str, Path] | None = None,
        volumes: Sequence[str] = (),
        context: Path = REPOSITORY,
    ) -> str:
        """docker/Dockerfile of `context` on `base`; returns what the build printed."""
        given = {"BASE_IMAGE": base, **(arguments or {})}
        return self.buildah(
            "bud", "--isolation=chroot", "--format=docker", f"--tag={name}", f"--file={context / 'docker' / 'Dockerfile'}",
            *(f"--build-arg={key}={value}" for key, value in given.items()),
            *(f"--secret=id={key},src={file}" for key, file in (secrets or {}).items()),
            *(f"--volume={volume}" for volume in volumes),
            str(context),
        ).stdout  # fmt: skip

    def config(self, name: str) -> dict[str, object]:
        """What an image says of itself: User, Entrypoint, Env, ..."""
        found: dict[str, object] = json.loads(self.buildah("inspect", "--type=image", name).stdout)["Docker"]["config"]
        return found

    @contextmanager
    def container(self, name: str, volumes: Sequence[str] = ()) -> Iterator[Container]:
        """A container of an image, and its end."""
        made = self.buildah("from", "--pull-never", name).stdout.strip()
        try:
            yield Container(self, made, volumes)
        finally:
            self.buildah("rm", made)

    def remove(self) -> None:
        """All images and containers."""
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self._folder, ignore_errors=True)
