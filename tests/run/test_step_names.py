"""A step's file is named in one way, which is read back; other names are no steps."""

from pathlib import Path

import pytest

from simclr_dist.run.steps import step_name, step_of, steps_in


@pytest.mark.parametrize("step", [0, 7, 12_345_678, 123_456_789])
def test_a_name_says_its_step(step: int) -> None:
    assert step_of(Path("folder") / step_name(step, ".pt")) == step
    assert len(step_name(step)) >= len("step-XXXXXXXX")


@pytest.mark.parametrize("name", ["step-.pt", "step-7a.pt", "step-\u00b2.pt", "last.pt", "step-00000001.kept-0a.json"])
def test_another_name_says_none(name: str) -> None:
    assert step_of(Path(name)) is None


def test_steps_of_a_folder_ascend_by_number(tmp_path: Path) -> None:
    for name in ("step-00000010.pt", "step-00000009.pt", "step-100000000.pt", "step-best.pt", "step-00000003.json"):
        (tmp_path / name).touch()
    assert steps_in(tmp_path, ".pt") == [9, 10, 100_000_000]
    assert steps_in(tmp_path / "none", ".pt") == []
