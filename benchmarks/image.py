"""How large is the image, how long does it take to build, and does it train? Builds docker/Dockerfile whole and runs it.

python benchmarks/image.py             (root, buildah and debootstrap; 25 GB of disk for a while: torch is copied thrice)
python benchmarks/image.py --demo      (the whole `simclr-dist demo` inside, instead of a short run)

The base is a fresh Debian from the mirror that apt uses. pip's settings of this machine (an index, a certificate) hold in the
build too, as secrets. Ends with 1 when something in the image fails.
"""

import argparse
import configparser
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.pop(0)  # this folder, where this file has the name of the tests' package
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from image.store import Container, Store, why_not

_DRAW = (
    "from pathlib import Path; from simclr_dist.preflight.demo.images import write_demo_images as draw; "
    "draw(Path('images'), train=240, test=60)"
)
_CONFIG = """run_folder: runs/short
global_batch_size: 48
micro_batches: 2
steps: 4
device: cpu
data: {shards: data/train}
views: {preset: small, image_size: 32}
model: {encoder: resnet10, stem: small_stride2, projector_hidden: 64, projector_dim: 32}
optim: {warmup_steps: 1}
log: {every: 1}
"""
_ENCODER = "runs/short/encoders/step-00000004.safetensors"
_SHORT = [  # title and command
    ("draw 300 images", f'/opt/venv/bin/python -c "{_DRAW}"'),
    ("shard", "simclr-dist shard images/train data/train && simclr-dist shard images/test data/test"),
    ("train, 2 processes, 4 steps", f"printf '%s' '{_CONFIG}' > short.yaml && simclr-dist train short.yaml --processes 2"),
    ("eval", f"simclr-dist eval {_ENCODER} --train data/train --test data/test --device cpu"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="run the whole demo inside")
    parser.add_argument("--release", default="bookworm", help="of Debian, the base (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the store, and say where it is")
    arguments = parser.parse_args()
    if reason := why_not("debootstrap"):
        print(f"skipped: {reason}")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="simclr_dist-image-"))
    store = Store(folder)
    print(f"{platform.platform()}, {os.cpu_count()} cores; {store.buildah('--version').stdout.strip()}\n")
    print("| what | result |\n|---|---|", flush=True)
    try:
        root = folder / "root"
        _timed(f"base: debootstrap {arguments.release}", lambda: _debootstrap(arguments.release, root))
        _timed("base: import", lambda: store.base("localhost/base", root))
        subprocess.run(["rm", "-rf", str(root)], check=True)
        secrets, volumes = _pip_settings(folder)
        _timed("build", lambda: store.build("simclr-dist", "localhost/base", secrets=secrets, volumes=volumes))
        for line in store.buildah("images", "--format={{.Name}}: {{.Size}}").stdout.splitlines():
            print(f"| size of {line.partition(': ')[0]} | {line.partition(': ')[2]} |", flush=True)
        with store.container("simclr-dist") as container:
            good = _try(container, demo=arguments.demo)
    finally:
        if arguments.keep:
            print(f"\nbuildah --storage-driver=vfs --root={folder / 'images'} --runroot={folder / 'run'} images")
        else:
            store.remove()
    return 0 if good else 1


def _try(container: Container, *, demo: bool) -> bool:
    """The commands in the image; whether all of them end with 0."""
    steps = [("who runs it", "id -un"), ("--version", "simclr-dist --version"), ("/opt/venv", "du -sh /opt/venv | cut -f1")]
    steps += [("demo", "simclr-dist demo")] if demo else _SHORT
    for title, command in steps:
        begin = time.monotonic()
        done = container.run("sh", "-c", command)
        lines = done.stdout.strip().splitlines() or [""]
        shown = lines[0] if title != "train, 2 processes, 4 steps" else lines[-1]
        print(f"| {title} | {time.monotonic() - begin:.1f} s: {shown} |", flush=True)
        if done.returncode != 0:
            print(f"\nFAILED with {done.returncode}:\n{done.stdout}")
            return False
    return True


def _timed(title: str, work: Callable[[], object]) -> None:
    begin = time.monotonic()
    work()
    print(f"| {title} | {time.monotonic() - begin:.0f} s |", flush=True)


def _debootstrap(release: str, root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", release, str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def _pip_settings(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """What pip is told on this machine, as the secrets `pip` and `ca`; and the folders that its indexes are in, if any."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = {
        key.rpartition(".")[2]: value.strip("'").replace("\\n", " ")
        for key, _, value in (line.partition("=") for line in listed.splitlines())
        if key.startswith(("global.", "install.", ":env:."))
    }
    settings = {key: value for key, value in settings.items() if key in _PASSED_ON}
    secrets = {}
    if certificate := settings.get("cert"):
        secrets["ca"], settings["cert"] = Path(certificate), "/run/secrets/ca"
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = settings
    secrets["pip"] = folder / "pip.conf"
    with secrets["pip"].open("w") as file:
        config.write(file)
    words = " ".join(settings.values()).replace("file://", "").split()
    folders = [Path(word) for word in words if word.startswith("/") and not word.startswith("/run/")]
    mounted = {str(path.parent if path.name == "simple" else path) for path in folders if path.is_dir()}
    return secrets, [f"{path}:{path}:ro" for path in sorted(mounted)]


_PASSED_ON = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "timeout", "default-timeout")

if __name__ == "__main__":
    sys.exit(main())
