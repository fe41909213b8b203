"""Suite-wide rules: what may be skipped, and where."""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.util import find_spec

import pytest

IN_CI = os.environ.get("CI") == "true"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that compare with torch or transformers are skipped, visibly, where those are absent."""
    if item.get_closest_marker("torch_required"):
        absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if absent:
            pytest.skip(f"{' and '.join(absent)} not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, which installs everything that tests need, a skip is a failure."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files (`pytest.importorskip` at the top of one)."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report
