"""TensorBoard as `tensorboard --logdir` starts it, with its default loader, asked over HTTP on the loopback."""

import contextlib
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training_runs import until


@contextlib.contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """TensorBoard on a free port; its address."""
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stdout=output, stderr=output)
    try:
        until(lambda: process.poll() is not None or bool(re.search(r"at (http://\S+)", log.read_text())), 500.0)
        found = re.search(r"at (http://\S+)", log.read_text())
        assert found, log.read_text()
        yield found[1].rstrip("/") + "/"
    finally:
        process.terminate()
        process.wait()


def ask(address: str, route: str, **query: Any) -> Any:
    with urllib.request.urlopen(f"{address}data/{route}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
        body = answer.read()
    return json.loads(body) if answer.headers["Content-Type"].startswith("application/json") else body


def steps(address: str) -> dict[tuple[str, str], list[int]]:
    """The steps of every scalar, by run and tag."""
    tags = ask(address, "plugin/scalars/tags")
    every = [(run, tag) for run, of_run in tags.items() for tag in of_run]
    return {(run, tag): [step for _, step, _ in ask(address, "plugin/scalars/scalars", tag=tag, run=run)] for run, tag in every}
