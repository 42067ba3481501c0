"""Crontabs as people write them: five fields, or @daily and the like."""

from __future__ import annotations

import re
from typing import Any

from celery.schedules import ParseException, crontab, crontab_parser

SHORTHANDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}

_MONTHS = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
_WEEKDAYS = "(?:sun|mon|tue|wed|thu|fri|sat)"

# What each field is called, the parser's count and first value, the names that it may hold, and what may be there.
_FIELDS = {
    "minute": ("minute", 60, 0, "", "0 to 59"),
    "hour": ("hour", 24, 0, "", "0 to 23"),
    "day_of_month": ("day of the month", 31, 1, "", "1 to 31"),
    "month_of_year": ("month", 12, 1, f"|{_MONTHS}", "1 to 12, or jan to dec"),
    "day_of_week": ("weekday", 7, 0, f"|{_WEEKDAYS}", "0 (Sunday) to 6, or sun to sat"),
}
_LONGEST = 60  # characters of a field, so that django-celery-beat's columns hold it


class CronError(ValueError):
    """A crontab that says nothing, with the reason for whoever wrote it."""


def parse_cron(text: str) -> dict[str, str]:
    """The fields of a crontab by the names that Celery gives them; CronError if they make no sense."""
    words = SHORTHANDS.get(text.strip().lower(), text).lower().split()
    if len(words) != len(_FIELDS):
        raise CronError(
            f"A crontab has 5 fields (minute, hour, day of the month, month, weekday), and this has {len(words)}. "
            "Example: 30 9 * * mon-fri"
        )
    fields = dict(zip(_FIELDS, words, strict=True))
    for name, word in fields.items():
        _check_field(name, word)
    try:
        crontab(**fields)
    except ValueError:
        raise CronError(
            f"No month that this names has a day {fields['day_of_month']}, so it would never be due."
        ) from None
    return fields


def write_cron(row: Any) -> str:
    """The crontab of a row with fields so named, as people write it."""
    return " ".join(getattr(row, name).replace(" ", "") for name in _FIELDS)


def _check_field(name: str, word: str) -> None:
    title, count, first, names, values = _FIELDS[name]
    if len(word) > _LONGEST:
        raise CronError(f"The {title} of a crontab has {_LONGEST} characters at most. Use ranges, as in 0-10.")
    value = f"(?:[0-9]+{names})"
    for part in word.split(","):
        # Celery's parser lets pass what follows a good start ("*/5;"), and names in any field ("mon" as a minute).
        if not re.fullmatch(rf"(?:\*|{value}-{value})(?:/0*[1-9][0-9]*)?|{value}", part):
            raise CronError(f"{part!r} is no {title}. Write *, */n, a-b or {values}, with commas between.")
        try:
            crontab_parser(count, first).parse(part)
        except (ParseException, ValueError):
            raise CronError(f"{part!r} is no {title}. It has to be {values}.") from None
