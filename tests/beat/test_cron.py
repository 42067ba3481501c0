"""Crontabs as people write them: what is refused is refused by name, and the rest is what Celery reads."""

from __future__ import annotations

import pytest
from celery.schedules import crontab
from hypothesis import example, given
from hypothesis import strategies as st

from beat.cron import CronError, parse_cron


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "this has 0"),
        ("* * * *", "this has 4"),
        ("* * * * * *", "this has 6"),
        ("@fortnightly", "this has 1"),
        ("60 * * * *", "'60' is no minute. It has to be 0 to 59."),
        ("* 24 * * *", "'24' is no hour"),
        ("* * 0 * *", "'0' is no day of the month"),
        ("* * * 13 *", "'13' is no month"),
        ("* * * * 7", "'7' is no weekday. It has to be 0 (Sunday) to 6"),
        ("* * * * someday", "'someday' is no weekday"),
        ("mon * * * *", "'mon' is no minute"),
        ("* * * mon jan", "'mon' is no month"),
        ("*/0 * * * *", "'*/0' is no minute"),
        ("5/15 * * * *", "'5/15' is no minute"),
        ("*/5; * * * *", "'*/5;' is no minute"),
        ("-1 * * * *", "'-1' is no minute"),
        ("1,,2 * * * *", "'' is no minute"),
        ("٣ * * * *", "'٣' is no minute"),
        ("0 0 30 2 *", "it would never be due"),
        (",".join(map(str, range(60))) + " * * * *", "60 characters at most"),
    ],
)
def test_a_crontab_that_makes_no_sense_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(CronError) as refusal:
        parse_cron(text)
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*/15 9-17 * * mon-fri", ["*/15", "9-17", "*", "*", "mon-fri"]),
        ("  0  4 1,15 JAN-MAR *  ", ["0", "4", "1,15", "jan-mar", "*"]),
        ("0 22-4/2 * * fri-mon", ["0", "22-4/2", "*", "*", "fri-mon"]),
        ("@daily", ["0", "0", "*", "*", "*"]),
    ],
)
def test_a_crontab_is_read_field_by_field(text: str, expected: list[str]) -> None:
    assert list(parse_cron(text).values()) == expected


_words = st.text("0123456789*/-,;@#?LWmonjan ", max_size=30)


@given(st.one_of(_words, st.lists(_words, min_size=5, max_size=5).map(" ".join), st.text(max_size=20)))
@example("59-0/59 23-0 31-1 12-1 6-0")
def test_whatever_is_accepted_celery_accepts_too(text: str) -> None:
    try:
        fields = parse_cron(text)
    except CronError:
        return
    assert crontab(**fields).minute
