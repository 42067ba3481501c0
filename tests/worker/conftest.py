"""What the tests of workers share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """An empty folder, for what tasks note."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder
