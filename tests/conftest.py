"""One thread, as the ranks have: the same sums wherever a test runs, and no fight over a machine's few cores."""

import os
from collections.abc import Generator

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With SIMCLR_DIST_FORBID_SKIPS (CI): a skipped test fails, unless it is a GPU that is missing."""
    report = yield
    if report.skipped and "SIMCLR_DIST_FORBID_SKIPS" in os.environ and "CUDA" not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {report.longrepr}"
    return report
