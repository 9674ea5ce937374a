"""TensorBoard's own view of a run, asked over its HTTP interface; and what the pictures cost in between: nothing."""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard.summary import scalar

import training_runs as runs
from board_server import ask, server, steps
from host_sync import no_host_sync
from simclr_dist.cli.main import main as cli
from simclr_dist.cli.train import main
from simclr_dist.config.settings import Config
from simclr_dist.data.views.draws import ViewSettings
from simclr_dist.system.errors import printable
from simclr_dist.system.ranks import TYPED
from simclr_dist.train import loop
from simclr_dist.train.describe import run_card, view_grid
from simclr_dist.train.monitor.board import LAYOUT, SAMPLE, SECOND, EventFile, cosine_histogram, cosines


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"))


def test_the_board_of_a_resumed_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 5's checkpoint, with steps that are to be purged, and gone on."""
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"log": {"every": 1, "tensorboard": True, "views_every_epochs": 1}}
    config = str(runs.write_config(Path(), shards, steps=10, **changes))
    assert main([config]) == 0
    for path in [*Path("run/checkpoints").glob("*10*"), *Path("run/encoders").iterdir()]:
        path.unlink()
    assert main([config, "--steps", "9"]) == 0
    with server(Path("run/tb"), tmp_path / "tensorboard.log") as address:
        runs.until(lambda: bool(ask(address, "plugin/text/tags").get(".")), 120.0)
        assert ask(address, "runs") == [".", "second"]

        of_runs = {run: set(tags) for run, tags in ask(address, "plugin/scalars/tags").items()}
        assert of_runs["second"] == SECOND, "in a colour of their own"
        assert not of_runs["."] & SECOND
        tags = of_runs["."]
        points = ask(address, "plugin/scalars/scalars", tag="loss/nt_xent", run=".")
        assert [step for _, step, _ in points] == list(range(1, 10)), "step 10 of the killed start is gone"
        assert ask(address, "plugin/scalars/scalars", tag="run/restarts", run=".")[-1][2] == 1

        layout = ask(address, "plugin/custom_scalars/layout")
        charts = {chart["title"]: chart for room in layout["category"] for chart in room["chart"]}
        assert [room["title"] for room in layout["category"]] == list(LAYOUT)
        for title, chart in charts.items():
            if "multiline" in chart:
                wanted = chart["multiline"]["tag"]
                found = {
                    tag
                    for regex in wanted
                    for run in of_runs
                    for tag in ask(address, "plugin/custom_scalars/scalars", tag=regex, run=run)["tag_to_events"]
                }
                assert found or wanted == ["probe/", "eval/"], title
            else:
                (series,) = chart["margin"]["series"]
                assert set(series.values()) <= tags

        pictures = ask(address, "plugin/images/tags")["."]
        assert list(pictures) == ["views"]
        shown = ask(address, "plugin/images/images", tag="views", run=".", sample=0)
        assert [picture["step"] for picture in shown] == [0, 8], "8 steps an epoch"
        assert ask(address, f"plugin/images/individualImage?{shown[0]['query']}&")[:4] == b"\x89PNG"

        assert set(ask(address, "plugin/histograms/tags")["."]) == {"cosine/partners", "cosine/others"}
        bins = ask(address, "plugin/histograms/histograms", tag="cosine/others", run=".")
        assert [step for _, step, _ in bins] == list(range(1, 10))
        assert sum(count for _, _, count in bins[-1][2]) == pytest.approx(24 * 23)

        (tag,) = ask(address, "plugin/text/tags")["."]
        text = ask(address, "plugin/text/text", tag=tag, run=".")[-1]["text"]
        for word in ("205 images, 8 steps an epoch", "global_batch_size: 24", "command"):
            assert word in text


def test_what_lies_past_the_checkpoint_is_cut(tmp_path: Path) -> None:
    """By the loader that users get: steps that are not written again, a tag without an earlier step, and a damaged file."""
    killed = EventFile(tmp_path / "tb", purge_step=1)
    for step in range(1, 13):
        killed.add([scalar("loss", step)], step)
    killed.add([scalar("probe/knn_top1", 50.0)], 12)
    (damaged := tmp_path / "tb" / "events.out.tfevents.1.damaged").write_bytes(b"no event" * 100)
    resumed = EventFile(tmp_path / "tb", purge_step=6)
    for step in (8, 12):
        resumed.add([scalar("loss", step)], step)
    assert damaged.read_bytes() == b"no event" * 100
    damaged.unlink()
    with server(tmp_path / "tb", tmp_path / "log") as address:
        runs.until(lambda: any(12 in of_tag for of_tag in steps(address).values()), 120.0)
        assert steps(address) == {(".", "loss"): [1, 2, 3, 4, 5, 8, 12]}


def test_cosines_of_a_sample() -> None:
    torch.manual_seed(0)
    z_a, z_b = torch.randn(2, SAMPLE + 50, 8).unbind()
    partners, others = cosines(z_a, z_b)
    whole = torch.nn.functional.cosine_similarity(z_a[:SAMPLE, None], z_b[None, :SAMPLE], dim=2)
    torch.testing.assert_close(partners, whole.diagonal())
    assert (len(partners), len(others)) == (SAMPLE, SAMPLE * (SAMPLE - 1))
    torch.testing.assert_close(others.double().sum(), whole.double().sum() - whole.diagonal().double().sum())
    alone = cosines(z_a[:1], z_b[:1])
    assert [len(part) for part in alone] == [1, 0]


def test_a_histogram_keeps_its_ends_and_leaves_out_what_is_no_number() -> None:
    values = torch.tensor([-1.0, 1.0, 1.0 + 1e-7, 0.1, float("nan")])
    (value,) = cosine_histogram("x", values).value
    assert value.histo.num == 4
    assert sum(value.histo.bucket) == 4
    assert (value.histo.bucket[0], value.histo.bucket[-1]) == (1, 2)
    (empty,) = cosine_histogram("x", torch.empty(0)).value
    assert sum(empty.histo.bucket) == 0


def test_no_host_sync_between_two_lines(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loop, under a guard in every step that neither logs nor saves."""
    monkeypatch.chdir(tmp_path)
    guarded = []
    load = loop.load_steps
    guard = contextlib.ExitStack()

    def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for done, views in enumerate(load(*args, **kwargs)):
            if done and (done + 1) % 4:
                guarded.append(done + 1)
                guard.enter_context(no_host_sync())
            yield views
            guard.close()

    monkeypatch.setattr(loop, "load_steps", watched)
    changes: dict[str, Any] = {"log": {"every": 4, "tensorboard": True}, "checkpoint": {"every": 8}, "check_ranks_every": 0}
    with guard:
        assert main([str(runs.write_config(Path(), shards, steps=8, **changes))]) == 0
    assert guarded == [2, 3, 5, 6, 7]


def test_the_command_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank's own command line is the launcher's."""
    monkeypatch.setenv(TYPED, "of another test")
    assert cli(["--version"]) == 0
    assert "simclr-dist --version" in run_card(Config(), "10 images")
    monkeypatch.delenv(TYPED)
    assert shlex.join(sys.orig_argv) in run_card(Config(), "10 images")


def test_a_run_folder_whose_name_is_no_text(shards: Path, tmp_path: Path) -> None:
    """A byte of Latin-1, say. What Unix takes for a name, TensorBoard does not take for text."""
    runs.write_config(tmp_path, shards, steps=2)
    name = os.fsdecode(b"caf\xe9")
    assert f"new run: {printable(name)}" in runs.train(tmp_path, 1, "--run_folder", name, "--log.tensorboard", "true")
    assert runs.status(tmp_path / name)["state"] == "done"


def test_the_views_of_an_image_touch() -> None:
    """White lies between pairs."""
    views = [torch.full((20, 3, 8, 8), value) for value in (0.25, 0.75)]
    settings = dataclasses.replace(ViewSettings(), mean=(0.0,) * 3, std=(1.0,) * 3)
    grid = view_grid(views[0], views[1], settings)
    assert grid.shape == (3, 4 * (8 + 8) + 8, 4 * (16 + 8) + 8)
    line = grid[0, 12]
    assert line[:32].tolist() == [1.0] * 8 + [0.25] * 8 + [0.75] * 8 + [1.0] * 8
