"""Due times: against a minute-by-minute walk, against Celery, and on the days when clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from celery.schedules import crontab as celery_crontab
from celery.schedules import solar
from hypothesis import given
from hypothesis import strategies as st

from beat.timetable import EPOCH, ClockedTime, CrontabTimes, DueTimes, IntervalTimes, SolarTimes, Timetable

NEW_YORK = ZoneInfo("America/New_York")
MINUTE = timedelta(minutes=1)


def crontab(expression: str, zone: str = "UTC") -> CrontabTimes:
    parsed = celery_crontab.from_string(expression)
    return CrontabTimes(
        minutes=frozenset(parsed.minute),
        hours=frozenset(parsed.hour),
        days_of_month=frozenset(parsed.day_of_month),
        months=frozenset(parsed.month_of_year),
        days_of_week=frozenset(parsed.day_of_week),
        zone=ZoneInfo(zone),
    )


def due_between(times: Timetable, start: datetime, end: datetime) -> list[datetime]:
    found, instant = [], times.after(start - timedelta(microseconds=1))
    while instant is not None and instant < end:
        found.append(instant)
        instant = times.after(instant)
    return found


def walls(times: CrontabTimes, day: str) -> list[str]:
    start = datetime.fromisoformat(day).replace(tzinfo=times.zone)
    instants = due_between(times, start.astimezone(UTC), (start + timedelta(days=1)).astimezone(UTC))
    return [instant.astimezone(times.zone).strftime("%H:%M%z") for instant in instants]


# Clocks that change by an hour, by half an hour, at midnight, never, and that left out a day.
CHANGES = {
    "UTC": [EPOCH],
    "Asia/Kolkata": [EPOCH],
    "America/New_York": [datetime(2026, 3, 8, 7, tzinfo=UTC), datetime(2026, 11, 1, 6, tzinfo=UTC)],
    "Australia/Lord_Howe": [datetime(2026, 4, 4, 15, tzinfo=UTC), datetime(2026, 10, 3, 15, 30, tzinfo=UTC)],
    "America/Sao_Paulo": [datetime(2018, 11, 4, 3, tzinfo=UTC), datetime(2018, 2, 18, 2, tzinfo=UTC)],
    "Pacific/Apia": [datetime(2011, 12, 30, 10, tzinfo=UTC)],
}
anywhen = st.datetimes(datetime(1990, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
some_minutes = st.frozensets(st.integers(0, 59), min_size=1, max_size=4)
some_hours = st.one_of(st.just(frozenset(range(24))), st.frozensets(st.integers(0, 23), min_size=1, max_size=4))
weekdays = st.one_of(st.just(frozenset(range(7))), st.frozensets(st.integers(0, 6), min_size=1, max_size=3))
days = st.one_of(st.just(frozenset(range(1, 32))), st.frozensets(st.integers(1, 28), min_size=1, max_size=5))


@st.composite
def crontabs_and_instants(draw: st.DrawFn) -> tuple[CrontabTimes, datetime]:
    """A crontab and an instant, as often as not near a change of the clocks."""
    zone = draw(st.sampled_from(sorted(CHANGES)))
    times = CrontabTimes(
        minutes=draw(some_minutes),
        hours=draw(some_hours),
        days_of_month=draw(days),
        months=frozenset(range(1, 13)),
        days_of_week=draw(weekdays),
        zone=ZoneInfo(zone),
    )
    change = draw(st.sampled_from(CHANGES[zone])) + draw(st.timedeltas(-timedelta(2), timedelta(2)))
    return times, draw(st.one_of(st.just(change), anywhen))


def walked(times: CrontabTimes, start: datetime, end: datetime) -> list[datetime]:
    """What is due in [start, end), found by trying every minute; slow, and nothing like the code under test."""

    def matches(wall: datetime) -> bool:
        return (
            wall.minute in times.minutes
            and wall.hour in times.hours
            and wall.day in times.days_of_month
            and wall.month in times.months
            and wall.isoweekday() % 7 in times.days_of_week
        )

    steps = [start + minute * MINUTE for minute in range((end - start) // MINUTE)]
    if times.hours == frozenset(range(24)):
        return [instant for instant in steps if matches(instant.astimezone(times.zone))]
    first_wall = start.astimezone(times.zone).replace(tzinfo=None, fold=0) - timedelta(days=2)
    wall_times = (first_wall + minute * MINUTE for minute in range((end - start) // MINUTE + 4 * 1440))
    due = {wall.replace(tzinfo=times.zone).astimezone(UTC) for wall in wall_times if matches(wall)}
    return sorted(instant for instant in due if start <= instant < end)


@given(crontabs_and_instants())
def test_a_crontab_is_due_just_when_a_walk_over_all_minutes_says(case: tuple[CrontabTimes, datetime]) -> None:
    times, around = case
    around = around.replace(second=0, microsecond=0)
    start, end = around - timedelta(hours=20), around + timedelta(hours=20)
    expected = walked(times, start, end)
    assert due_between(times, start, end) == expected
    assert times.latest(around) == max((i for i in expected if i <= around), default=times.latest(start))


@given(crontabs_and_instants())
def test_looking_back_and_looking_ahead_agree(case: tuple[CrontabTimes, datetime]) -> None:
    times, now = case
    following, latest = times.after(now), times.latest(now)
    assert following is not None
    assert latest is not None
    assert latest <= now < following
    assert times.after(latest) == following
    assert times.latest(following) == following
    assert times.latest(following - timedelta(microseconds=1)) == latest


@given(some_minutes, some_hours, days, weekdays, anywhen)
def test_where_clocks_never_change_celery_agrees(
    minutes: frozenset[int],
    hours: frozenset[int],
    days_of_month: frozenset[int],
    days_of_week: frozenset[int],
    now: datetime,
) -> None:
    fields = dict(minute=set(minutes), hour=set(hours), day_of_month=set(days_of_month), day_of_week=set(days_of_week))
    times = CrontabTimes(minutes, hours, days_of_month, frozenset(range(1, 13)), days_of_week, UTC)
    expected = now + celery_crontab(**fields, nowfun=lambda: now).remaining_estimate(now)
    assert times.after(now) == expected


@pytest.mark.parametrize(
    ("expression", "day", "expected"),
    [
        # Spring: 02:00 to 02:59 are left out.
        ("30 2 * * *", "2026-03-08", ["03:30-0400"]),
        ("30 2,3 * * *", "2026-03-08", ["03:30-0400"]),
        ("0 */6 * * *", "2026-03-08", ["00:00-0500", "06:00-0400", "12:00-0400", "18:00-0400"]),
        ("30 1 * * *", "2026-03-08", ["01:30-0500"]),
        # Autumn: 01:00 to 01:59 come twice.
        ("30 1 * * *", "2026-11-01", ["01:30-0400"]),
        ("0,30 1-2 * * *", "2026-11-01", ["01:00-0400", "01:30-0400", "02:00-0500", "02:30-0500"]),
    ],
)
def test_when_clocks_change_a_wall_time_is_due_once(expression: str, day: str, expected: list[str]) -> None:
    assert walls(crontab(expression, "America/New_York"), day) == expected


@pytest.mark.parametrize(("day", "hours"), [("2026-03-08", 23), ("2026-11-01", 25), ("2026-07-01", 24)])
def test_when_clocks_change_a_crontab_for_every_hour_keeps_its_pace(day: str, hours: int) -> None:
    start = datetime.fromisoformat(day).replace(tzinfo=NEW_YORK)
    found = due_between(
        crontab("*/15 * * * *", "America/New_York"),
        start.astimezone(UTC),
        (start + timedelta(days=1)).astimezone(UTC),
    )
    assert len(found) == 4 * hours
    assert {later - earlier for earlier, later in pairwise(found)} == {15 * MINUTE}


def test_a_rare_crontab_is_found_years_away() -> None:
    times = crontab("0 0 29 2 1")  # a leap day that is a Monday
    assert times.after(datetime(2026, 11, 23, tzinfo=UTC)) == datetime(2044, 2, 29, tzinfo=UTC)
    assert times.latest(datetime(2026, 11, 23, tzinfo=UTC)) == datetime(2016, 2, 29, tzinfo=UTC)


@given(st.timedeltas(timedelta(seconds=1), timedelta(days=400)), anywhen, anywhen)
def test_an_interval_is_a_grid(every: timedelta, anchor: datetime, now: datetime) -> None:
    times = IntervalTimes(every, anchor)
    latest, following = times.latest(now), times.after(now)
    assert latest is not None
    assert following is not None
    assert latest <= now < following
    assert following - latest == every
    assert (latest - anchor) % every == timedelta(0)


def test_an_interval_without_a_start_counts_from_the_epoch() -> None:
    now = datetime(2026, 11, 23, 10, 7, 31, tzinfo=UTC)
    assert IntervalTimes(10 * MINUTE).latest(now) == datetime(2026, 11, 23, 10, 0, tzinfo=UTC)
    assert IntervalTimes(timedelta(days=1)).latest(now) == datetime(2026, 11, 23, tzinfo=UTC)


def test_a_clocked_time_comes_once() -> None:
    at = datetime(2026, 11, 23, 10, tzinfo=UTC)
    assert ClockedTime(at).latest(at - MINUTE) is None
    assert ClockedTime(at).after(at - MINUTE) == ClockedTime(at).latest(at) == at
    assert ClockedTime(at).after(at) is None


def celerys_sunrise(day: datetime) -> datetime:
    berlin = solar("sunrise", 52.52, 13.4, nowfun=lambda: day)
    sunrise: datetime = day + berlin.remaining_estimate(day)
    return sunrise


@given(st.timedeltas(timedelta(0), timedelta(hours=20)))
def test_beats_that_look_at_different_times_agree_on_a_sunrise(later: timedelta) -> None:
    times = SolarTimes(solar("sunrise", 52.52, 13.4))
    expected = celerys_sunrise(datetime(2026, 11, 23, tzinfo=UTC)).replace(microsecond=0)
    assert times.latest(expected + later) == expected
    assert times.after(expected - MINUTE - later) == expected


def test_the_sun_does_not_set_in_a_polar_summer() -> None:
    tromso = SolarTimes(solar("sunset", 69.65, 18.96))
    midsummer = datetime(2026, 6, 21, 12, tzinfo=UTC)
    assert tromso.latest(midsummer).month == 5  # type: ignore[union-attr]
    assert tromso.after(midsummer).month == 7  # type: ignore[union-attr]


NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
HOURLY = IntervalTimes(timedelta(hours=1))


def test_of_the_due_times_missed_while_no_beat_ran_only_the_latest_is_due() -> None:
    times = DueTimes(HOURLY, fired=NOON - timedelta(hours=5))
    assert times.due(NOON + MINUTE) == NOON
    assert times.following(NOON + MINUTE) == NOON + timedelta(hours=1)


def test_what_was_fired_is_not_due_again() -> None:
    assert DueTimes(HOURLY, fired=NOON).due(NOON + MINUTE) is None
    assert DueTimes(HOURLY, fired=NOON + MINUTE).due(NOON + 59 * MINUTE) is None


def test_the_due_time_of_a_one_off_does_not_change_however_late_it_is_looked_at() -> None:
    times = DueTimes(HOURLY, fired=NOON - MINUTE, one_off=True)
    assert times.due(NOON) == times.due(NOON + timedelta(days=3)) == NOON


def test_a_due_time_missed_by_more_than_its_grace_is_dropped() -> None:
    times = DueTimes(HOURLY, fired=NOON - timedelta(hours=5), grace=5 * MINUTE)
    assert times.due(NOON + 4 * MINUTE) == NOON
    assert times.due(NOON + 6 * MINUTE) is None
    assert times.following(NOON + 6 * MINUTE) == NOON + timedelta(hours=1)


def test_nothing_is_due_before_the_start_and_the_start_itself_may_be() -> None:
    times = DueTimes(HOURLY, fired=EPOCH, start=NOON)
    assert times.due(NOON - MINUTE) is None
    assert times.following(NOON - timedelta(days=3)) == NOON
    assert times.due(NOON) == NOON
