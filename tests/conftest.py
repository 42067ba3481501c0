"""What all tests share: real servers and real workers."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.servers", "tests.cluster"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file's tests in one process, but for crash points: these take minutes each."""
    for item in items:
        if item.path.parent.name != "crash_points":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
