"""What all tests share: real servers and real workers."""

from __future__ import annotations

pytest_plugins = ["tests.servers", "tests.cluster"]
