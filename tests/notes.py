"""What tasks have noted in a folder of the test's, a line of JSON each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(notes: Path, name: str) -> list[dict[str, Any]]:
    """Return the notes of that name, the oldest first; none when there is no such file yet."""
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
