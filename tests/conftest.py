"""For all tests: one thread, fixed seeds, and a rule for skips.

A test may be skipped for the reasons below alone. With PLAIT_STRICT_SKIPS=1 (as in `.ci/run`) any other skip
fails, so that a missing package or file cannot quietly take tests away.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # read when Triton is first imported, so before any test is: without a GPU its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

ALLOWED_SKIPS = ("needs a GPU", "needs 2 GPUs", "needs MPS", "not on this platform")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> Iterator[None]:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if os.environ.get("PLAIT_STRICT_SKIPS") == "1" and not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped ({reason}), but allowed are only: {', '.join(ALLOWED_SKIPS)}"
