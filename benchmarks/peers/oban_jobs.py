"""The job that oban-py's workers find by the name of this module."""

from __future__ import annotations

from typing import Any

from oban import worker


@worker()
class Step:
    """A job that returns what it got."""

    async def process(self, job: Any) -> Any:
        """Do nothing."""
        return None
