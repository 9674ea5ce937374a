"""The image: built from docker/Dockerfile and run, in small; `make bench-image` builds the whole one."""

import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from image import small
from image.store import REPOSITORY, Container, Store, why_not
from simclr_dist import __version__
from simclr_dist.config.load import load_config

DOCKER = REPOSITORY / "docker"


def required() -> list[str]:
    """What setup.cfg asks for."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    return ["setuptools", *setup["options"]["install_requires"].split()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """With the image `small`."""
    if reason := why_not() or small.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("image")
    made = Store(folder)
    try:
        made.base("localhost/base", folder / "root", small.make_root(folder / "root"))
        small.make_wheels(folder / "wheels", required())
        arguments = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        printed = made.build(
            "small", "localhost/base", arguments=arguments, volumes=[*small.volumes(), f"{folder}/wheels:/wheels:ro"]
        )
        assert "warning" not in printed.lower(), printed
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def container(store: Store) -> Iterator[Container]:
    with store.container("small", small.volumes()) as started:
        yield started


@pytest.mark.slow
def test_the_program_is_what_the_image_runs_and_not_as_root(store: Store, container: Container) -> None:
    config = store.config("small")
    assert (config["Entrypoint"], config["Cmd"]) == (["simclr-dist"], ["--help"])
    assert (config["User"], config["WorkingDir"]) == ("10001", "/work")
    assert container.run("/usr/bin/id", "-un").stdout == "simclr\n"
    done = container.run("simclr-dist", "--version")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"simclr-dist {__version__}"), done.stdout
    done = container.run("simclr-dist", "train", "--help")
    assert done.returncode == 0, done.stdout
    assert "--optim.base-lr" in done.stdout
    done = container.run("simclr-dist", "train", "nope.yaml")
    assert done.returncode == 2
    assert done.stdout.startswith("simclr-dist: nope.yaml: cannot read the config: No such file or directory; ")


@pytest.mark.slow
def test_packages_are_the_pinned_ones(container: Container) -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = dict(
        line.split("==") for line in container.run("pip", "list", "--format=freeze").stdout.splitlines() if "==" in line
    )
    lower = {name.lower().replace("_", "-"): version for name, version in installed.items()}
    found = {name: lower[key] for name in pins if (key := name.lower().replace("_", "-")) in lower}
    assert found == {name: pins[name] for name in found}
    assert {"torch", "torchvision", "numpy", "PyYAML"} <= set(found)
    assert "pytest" not in lower


@pytest.mark.slow
def test_it_can_write_where_it_works_and_nowhere_else(container: Container) -> None:
    assert container.run("/bin/sh", "-c", "touch /work/a /cache/a /tmp/a && rm /work/a /cache/a /tmp/a").returncode == 0
    for place in ("/opt/venv/bin", "/opt/simclr_dist", "/etc"):
        assert container.run("/usr/bin/touch", f"{place}/a").returncode == 1


@pytest.mark.slow
def test_nothing_is_left_of_building_it(container: Container) -> None:
    left = container.run("/usr/bin/find", "/tmp", "/var", "/opt/simclr_dist", "-type", "f").stdout.split()
    left = [name for name in left if not name.startswith("/opt/simclr_dist/simclr_dist/")]
    assert sorted(Path(name).name for name in left) == [
        "LICENSE",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.cfg",
    ]
    assert container.run("/bin/sh", "-c", "test -e ~root/.cache").returncode == 1
    calls = container.run("/usr/bin/cat", "/stand-ins/calls").stdout.splitlines()
    assert calls[0] == "update"
    assert calls[1].startswith("install --yes --no-install-recommends ")


def test_compose() -> None:
    """TensorBoard is published on this machine alone; data is read, runs are written; GPUs are asked for by one profile."""
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert compose["volumes"] == {"cache": None}
    assert services["tensorboard"]["ports"] == ["127.0.0.1:${TENSORBOARD_PORT:-6006}:6006"]
    assert [name for name, service in services.items() if "ports" in service] == ["tensorboard"]
    assert [name for name, service in services.items() if "deploy" in service] == ["train-gpu"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "train-cpu": ["cpu"], "train-gpu": ["gpu"], "tensorboard": ["cpu", "gpu"],
    }  # fmt: skip
    for name, service in services.items():
        assert service["read_only"], name
        writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
        assert writable == ([] if name == "tensorboard" else ["${CACHE:-cache}:/cache", "${RUNS:-../runs}:/work/runs"])
        assert not service["user"].startswith(("0", "root"))
        if name != "tensorboard":
            assert "shm_size" in service
            assert service["environment"]["SIMCLR_DIST_CACHE"] == "/cache", "and not in a tmpfs, which is memory"
            config = service["command"][1].removeprefix("${CONFIG:-").removesuffix("}")
            assert load_config(REPOSITORY / config).data.shards.startswith("data/")
    built = services["train-cpu"]["build"]
    assert (DOCKER / built["context"] / built["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    first = next(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.startswith("ARG"))
    assert built["args"]["BASE_IMAGE"] == "${BASE_IMAGE:-" + first.partition("=")[2] + "}"


def test_hadolint() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_image_is_the_first_word() -> None:
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("ARG BASE_IMAGE=")
    assert lines[1] == "FROM ${BASE_IMAGE}"
