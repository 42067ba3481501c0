"""Values as Postgres holds them: the JSON that kombu writes."""

from __future__ import annotations

import json
from typing import Any

from kombu.utils import json as kombu_json

#: What kombu wraps a value in that JSON has no notation for (a date, say).
_WRAPPED = '"__type__"'


def loads(text: str) -> Any:
    """Read what ``kombu.utils.json.dumps`` has written; most of it is JSON as such, which takes a third of the time."""
    return kombu_json.loads(text) if _WRAPPED in text else json.loads(text)
