"""What all tests share: real servers and real workers."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.servers", "tests.cluster"]

#: Slow tests that share nothing with the others of their file: each may run in another process than they.
INDEPENDENT = frozenset({"test_faults.py", "test_scheduler.py"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process (``--dist loadgroup``): they share its workers."""
    for item in items:
        if item.path.name not in INDEPENDENT:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
