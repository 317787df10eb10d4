"""What every test shares: the rule that CI skips no proof, and threads that fit the machine."""

from __future__ import annotations

import os

# NumPy's BLAS threads and torch's would fight for the same cores; it reads this when it is first imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes that run tests side by side have a core each, what they start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from sslkernels import _library

if "PYTEST_XDIST_WORKER" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))

ISAS = _library.extension.supported_isas() if _library.extension else []
OTHER_ISAS = [isa for isa in ISAS if isa != _library.extension.isa()]  # all tests run on the one that is chosen


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def require_or_skip(condition: object, reason: str) -> None:
    """Skip the test unless ``condition`` holds; in CI, where everything a proof needs is installed, fail it."""
    if not condition:
        (pytest.fail if in_ci() else pytest.skip)(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("hardware"):
        fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped:
        fail_in_ci(report)
    return report


def fail_in_ci(report) -> None:
    """Turn a skip into a failure in CI, unless it is of a test marked ``hardware``."""
    if in_ci():
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr[2]}"
