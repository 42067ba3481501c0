"""Limits over the whole cluster: who may start, who waits for it, and what an operator has set.

What is counted, and how, is in :mod:`byrd.store.migrations.limits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from byrd.errors import LimitNotFoundError
from byrd.limits import Limit, spacing
from byrd.store import steps
from byrd.store.database import Store
from byrd.store.flow import RESEND_SECONDS
from byrd.store.migrations.limits import LAPSE
from byrd.store.rows import CHANNEL, WAKEUP, Claim, Wakeup, query, wakeups_of

_NOW = "clock_timestamp()"
#: So many keys are looked at in one transaction.
BATCH = 50
#: So many steps line up in one.
LINE_BATCH = 1000
#: So many steps that wait are counted, for people.
_FAR = 10_000
#: A key that nobody has used for so long is forgotten.
_FORGET = "interval '1 day'"


class Admission(Enum):
    """What became of a step whose task has a limit, and that was not claimed."""

    #: There was nothing to claim.
    NOTHING = "nothing"
    #: It waits for its turn.
    WAITS = "waits"


class Place(NamedTuple):
    """A limit's name, and the key of it in which a step has, or waits for, a place."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class LimitRow:
    """One key of a limit as it is now.  ``key`` is None when nobody has used the limit yet.

    ``running``: steps that have a place.  ``waiting``: steps that wait for one (at most 10,000 are counted).
    ``until``: when the next may start, unless that is at once, or nobody knows.  ``parked_until``: until when all are
    held back.  ``set_by`` and ``set_at``: who has set it otherwise than the code declares it.
    """

    name: str
    key: str | None
    rate: str | None
    burst: int
    concurrency: int | None
    running: int
    waiting: int
    until: datetime | None
    parked_until: datetime | None
    declared_rate: str | None
    declared_burst: int
    declared_concurrency: int | None
    set_by: str | None
    set_at: datetime | None


class Keep(Enum):
    """What is not given stays as it is."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP


# -- transitions -----------------------------------------------------------------------------------


def look(conn: Connection, step_id: str, attempt: int, *, task: str) -> Claim | None:
    """Return a ready step as it would be claimed, for its key depends on its arguments; change nothing."""
    row = (
        query(
            conn,
            f"""{steps.CLAIM_COLUMNS} WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s
                AND s.task = %(task)s AND s.wake_at < 'infinity' AND s.run_at <= {_NOW}""",
            {"id": step_id, "attempt": attempt, "task": task},
        )
        .mappings()
        .first()
    )
    return Claim(**{**row, "run_id": str(row["run_id"])}) if row is not None else None


def admit(
    conn: Connection,
    step_id: str,
    attempt: int,
    *,
    limit: Limit,
    place: Place,
    task: str,
    worker_id: str,
    pid: int,
    token: str,
    max_preemptions: int = steps.MAX_PREEMPTIONS,
) -> Claim | Admission:
    """ready → running, with a place and a token of its limit; or the step waits for its turn, without an attempt.

    Otherwise as :func:`byrd.store.steps.claim`.
    """
    claim = steps.claim(
        conn, step_id, attempt, task=task, worker_id=worker_id, pid=pid, token=token, max_preemptions=max_preemptions
    )
    if claim is None:
        return Admission.NOTHING
    admitted = query(
        conn,
        """SELECT byrd.admit(%(id)s, %(token)s::uuid, %(name)s, %(key)s, %(rate)s, %(every)s, %(burst)s::int,
                             %(concurrency)s::int)""",
        {"id": step_id, "token": token, **place._asdict(), **_declared(limit)},
    ).scalar()
    return claim if admitted else Admission.WAITS


def ending(
    conn: Connection, transition: Callable[..., list[Wakeup]], place: Place, /, *args: Any, **kwargs: Any
) -> list[Wakeup]:
    """Do what ends an attempt, and give its place to the next that waits: so that needs no relay."""
    wakeups = transition(conn, *args, **kwargs)
    if query(conn, "SELECT byrd.give_places(%(name)s, %(key)s, 'due')", place._asdict()).scalar():
        wakeups = wakeups + _take_due(conn, [place])
    return wakeups


def line_up(conn: Connection, step_ids: Sequence[str]) -> tuple[list[str], list[Wakeup]]:
    """Give a ticket to ready steps whose key is known, in this order, and places to those for which there are some.

    Returns the steps that have lined up, and the wake-ups of those, or others of their keys, that may start now.
    """
    rows = query(conn, "SELECT * FROM byrd.line_up(%(ids)s::text[])", {"ids": list(step_ids)}).all()
    places = sorted({Place(row.name, row.key) for row in rows})
    return [row.step for row in rows], _take_due(conn, places) if places else []


def line_up_all(store: Store, limited: Sequence[Wakeup]) -> list[Wakeup]:
    """Have steps line up, in transactions of a bearable length; return those to publish."""
    found: list[Wakeup] = []
    for start in range(0, len(limited), LINE_BATCH):
        part = limited[start : start + LINE_BATCH]
        lined, wakeups = store.run(line_up, [wakeup.id for wakeup in part])
        there = set(lined)
        found += [wakeup for wakeup in part if wakeup.id not in there] + wakeups
    return found


def _take_due(conn: Connection, places: Sequence[Place]) -> list[Wakeup]:
    """Return the steps of these keys that have a place and may start now; mark them as published."""
    rows = query(
        conn,
        f"""UPDATE byrd.steps s SET sends = 1, wake_at = {_NOW} + {RESEND_SECONDS} * interval '1 second'
              FROM unnest(%(names)s::text[], %(keys)s::text[]) AS p (name, key)
             WHERE s.limit_name = p.name AND s.limit_key = p.key AND s.limit_slot IS NOT NULL
               AND s.status = 'ready' AND s.sends = 0 AND s.run_at <= {_NOW} AND s.wake_at < 'infinity'
            RETURNING {WAKEUP}""",
        {"names": [place.name for place in places], "keys": [place.key for place in places]},
    )
    return wakeups_of(rows)


def give_due(conn: Connection) -> int:
    """Give places to those who wait, for the keys where it is time to look; return for how many keys."""
    rows = query(
        conn,
        """SELECT name, key FROM byrd.limit_keys WHERE next_at <= now() ORDER BY next_at LIMIT %(limit)s
           FOR UPDATE SKIP LOCKED""",
        {"limit": BATCH},
    ).all()
    for row in rows:
        query(conn, "SELECT byrd.give_places(%(name)s, %(key)s, 'all')", {"name": row.name, "key": row.key})
    return len(rows)


def park(conn: Connection, place: Place, seconds: float) -> None:
    """Let no step of a key start for so long, whatever the limit; a longer pause that there is stays.

    Raises :class:`LimitNotFoundError` when there is no limit of that name.
    """
    found = query(
        conn,
        f"""INSERT INTO byrd.limit_keys AS k (name, key, parked_until)
            SELECT name, %(key)s, {_NOW} + %(seconds)s * interval '1 second' FROM byrd.limits WHERE name = %(name)s
            ON CONFLICT (name, key) DO UPDATE SET parked_until = greatest(k.parked_until, excluded.parked_until)""",
        {**place._asdict(), "seconds": seconds},
    )
    if found.rowcount == 0:
        raise _not_found(place.name)


def unpark(conn: Connection, place: Place) -> bool:
    """Let the steps of a key start again; tell whether it was parked."""
    found = query(
        conn,
        f"""UPDATE byrd.limit_keys SET parked_until = NULL, next_at = now()
             WHERE name = %(name)s AND key = %(key)s AND parked_until > {_NOW}""",
        place._asdict(),
    ).rowcount
    query(conn, f"NOTIFY {CHANNEL}")
    return found > 0


def retry_later(
    conn: Connection, step_id: str, attempt: int, error: str | None, *, place: Place, delay: float
) -> list[Wakeup]:
    """running → ready after ``delay`` seconds, and its key is parked for as long.  It costs the step no retry."""
    park(conn, place, delay)
    return steps.retry(conn, step_id, attempt, error, delay=delay, counted=False)


def declare(conn: Connection, limits: Sequence[Limit], *, anew: bool = False) -> None:
    """Have the limits that the code declares on record; ``anew``: as it declares them now, for a worker starts."""
    for limit in sorted(limits, key=lambda found: found.name or ""):
        query(
            conn,
            f"""INSERT INTO byrd.limits AS l (name, rate, every, burst, concurrency)
                VALUES (%(name)s, %(rate)s, %(every)s, %(burst)s, %(concurrency)s)
                ON CONFLICT (name) DO UPDATE SET rate = excluded.rate, every = excluded.every,
                       burst = excluded.burst, concurrency = excluded.concurrency, declared_at = {_NOW}
                 WHERE %(anew)s AND (l.rate, l.every, l.burst, l.concurrency)
                       IS DISTINCT FROM (excluded.rate, excluded.every, excluded.burst, excluded.concurrency)""",
            {"name": limit.name, "anew": anew, **_declared(limit)},
        )


def _declared(limit: Limit) -> dict[str, Any]:
    return {
        "rate": limit.rate,
        "every": limit.every_seconds,
        "burst": limit.burst,
        "concurrency": limit.concurrency,
    }


def change(
    conn: Connection,
    name: str,
    *,
    rate: str | Keep | None = KEEP,
    burst: int | Keep = KEEP,
    concurrency: int | Keep | None = KEEP,
    by: str | None = None,
) -> None:
    """Set a limit otherwise than the code declares it; None is no such limit.  It holds at once, for all workers.

    Raises :class:`LimitNotFoundError` when there is no limit of that name.
    """
    sets: dict[str, Any] = {}
    if not isinstance(rate, Keep):
        sets |= {"set_rate": rate or "none", "set_every": 0.0 if rate is None else spacing(rate)}
    if not isinstance(burst, Keep):
        sets["set_burst"] = burst
    if not isinstance(concurrency, Keep):
        sets["set_concurrency"] = -1 if concurrency is None else concurrency
    _change(conn, name, {**sets, "set_by": by})


def reset(conn: Connection, name: str) -> None:
    """Let a limit be again as the code declares it; raise :class:`LimitNotFoundError` when there is none."""
    columns = ("set_rate", "set_every", "set_burst", "set_concurrency", "set_by")
    _change(conn, name, dict.fromkeys(columns), set_at="NULL")


def _change(conn: Connection, name: str, sets: dict[str, Any], *, set_at: str = _NOW) -> None:
    before = query(
        conn,
        "SELECT coalesce(set_every, every) AS every FROM byrd.limits WHERE name = %(name)s FOR UPDATE",
        {"name": name},
    ).first()
    if before is None:
        raise _not_found(name)
    assigned = ", ".join(f"{column} = %({column})s" for column in sets)
    after = query(
        conn,
        f"""UPDATE byrd.limits SET {assigned}, set_at = {set_at} WHERE name = %(name)s
            RETURNING coalesce(set_every, every) AS every""",
        {"name": name, **sets},
    ).one()
    # What has been used of a rate is so many calls, not so much time; and whoever waits may have less to wait for.
    query(
        conn,
        f"""UPDATE byrd.limit_keys SET next_at = now(),
                   tat = CASE WHEN tat > {_NOW} AND %(old)s > 0 THEN {_NOW} + (tat - {_NOW}) * (%(new)s / %(old)s)
                              ELSE tat END,
                   tail = NULL
             WHERE name = %(name)s""",
        {"name": name, "old": before.every, "new": after.every},
    )
    query(conn, f"NOTIFY {CHANNEL}")


def _not_found(name: str) -> LimitNotFoundError:
    return LimitNotFoundError(f"no limit is called {name!r}: `byrd limits` lists those that there are")


def forget_idle(conn: Connection) -> int:
    """Delete keys that nobody has used for a day; return how many."""
    return query(
        conn,
        f"""DELETE FROM byrd.limit_keys k USING (
              SELECT name, key FROM byrd.limit_keys WHERE seen_at < now() - {_FORGET} AND next_at IS NULL
                 AND (tat IS NULL OR tat < now()) AND (parked_until IS NULL OR parked_until < now())
               ORDER BY seen_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED) idle
             WHERE k.name = idle.name AND k.key = idle.key""",
    ).rowcount


def follow_clock_back(conn: Connection) -> None:
    """Set right what bears times to come, for Postgres's clock was set back: a burst may pass once more."""
    query(
        conn,
        "UPDATE byrd.limit_keys SET tat = NULL, tail = NULL, next_at = now() WHERE tat > now() OR next_at > now()",
    )
    query(conn, "UPDATE byrd.limit_keys SET seen_at = now() WHERE seen_at > now()")
    query(
        conn,
        "UPDATE byrd.steps SET limit_slot = now() WHERE limit_slot IS NOT NULL AND limit_slot > now() + interval '2 s'",
    )


# -- reading ---------------------------------------------------------------------------------------

_EFFECTIVE = """CASE WHEN l.set_rate IS NULL THEN l.rate ELSE nullif(l.set_rate, 'none') END AS rate,
       coalesce(l.set_burst, l.burst) AS burst,
       nullif(coalesce(l.set_concurrency, l.concurrency), -1) AS concurrency"""
#: When the next token is to be had.
_NEXT = """k.tat - (coalesce(l.set_burst, l.burst) - 1) * coalesce(l.set_every, l.every) * interval '1 second'"""


def list_limits(conn: Connection, *, name: str | None = None, limit: int = 100) -> list[LimitRow]:
    """Return the limits, each with the keys that are in use, the busiest first; one that has none, with key None."""
    rows = query(
        conn,
        f"""WITH used AS MATERIALIZED (
              SELECT limit_name AS name, limit_key AS key, count(*) FILTER (WHERE status = 'running') AS running,
                     count(*) FILTER (WHERE status = 'ready') AS given
                FROM byrd.steps WHERE limit_slot IS NOT NULL GROUP BY 1, 2),
            keys AS (
              SELECT k.name, k.key, k.tat, k.parked_until, coalesce(u.running, 0) AS running, coalesce(u.given, 0)
                     + CASE WHEN k.next_at IS NULL THEN 0 ELSE (SELECT count(*) FROM (SELECT 1 FROM byrd.steps s
                          WHERE s.limit_name = k.name AND s.limit_key = k.key AND s.status = 'ready'
                            AND s.limit_no IS NOT NULL AND s.limit_slot IS NULL AND s.wake_at < 'infinity'
                          LIMIT {_FAR}) far) END AS waiting
                FROM byrd.limit_keys k LEFT JOIN used u ON u.name = k.name AND u.key = k.key
               WHERE u.name IS NOT NULL OR k.next_at IS NOT NULL OR k.parked_until > {_NOW})
            SELECT l.name, k.key, {_EFFECTIVE}, coalesce(k.running, 0) AS running, coalesce(k.waiting, 0) AS waiting,
                   CASE WHEN coalesce(l.set_every, l.every) > 0 AND greatest({_NEXT}, k.parked_until) > {_NOW}
                        THEN greatest({_NEXT}, k.parked_until)
                        WHEN k.parked_until > {_NOW} THEN k.parked_until END AS until,
                   CASE WHEN k.parked_until > {_NOW} THEN k.parked_until END AS parked_until,
                   l.rate AS declared_rate, l.burst AS declared_burst, l.concurrency AS declared_concurrency,
                   l.set_by, l.set_at
              FROM byrd.limits l LEFT JOIN keys k ON k.name = l.name
             WHERE (%(name)s::text IS NULL OR l.name = %(name)s)
             ORDER BY l.name, k.waiting DESC NULLS LAST, k.running DESC, k.key LIMIT %(limit)s""",
        {"name": name, "limit": limit},
    ).mappings()
    return [LimitRow(**row) for row in rows]


class Turn(NamedTuple):
    """What a step waits for that has no place yet.

    ``until``: when it is expected to start, as far as a rate or a parked key tells; ``before`` it wait so many steps.
    """

    rate: str | None
    burst: int
    concurrency: int | None
    running: int
    before: int
    until: datetime | None
    parked_until: datetime | None


def turn_of(conn: Connection, place: Place, ticket: int) -> Turn | None:
    """Return what a step with this ticket waits for; None when the limit is not on record any more."""
    row = query(
        conn,
        f"""SELECT {_EFFECTIVE}, q.running, q.before,
                   CASE WHEN coalesce(l.set_every, l.every) > 0
                        THEN greatest({_NOW}, {_NEXT}, k.parked_until)
                             + q.before * coalesce(l.set_every, l.every) * interval '1 second'
                        WHEN k.parked_until > {_NOW} THEN k.parked_until END AS until,
                   CASE WHEN k.parked_until > {_NOW} THEN k.parked_until END AS parked_until
              FROM byrd.limits l
              LEFT JOIN byrd.limit_keys k ON k.name = l.name AND k.key = %(key)s,
              LATERAL (SELECT
                (SELECT count(*) FROM byrd.steps s WHERE s.limit_name = %(name)s AND s.limit_key = %(key)s
                    AND s.limit_slot IS NOT NULL AND (s.status = 'running' OR s.limit_slot > {_NOW} - {LAPSE}))
                  AS running,
                (SELECT count(*) FROM (SELECT 1 FROM byrd.steps s WHERE s.limit_name = %(name)s
                    AND s.limit_key = %(key)s AND s.status = 'ready' AND s.limit_no < %(ticket)s
                    AND s.limit_slot IS NULL AND s.wake_at < 'infinity' LIMIT {_FAR}) far) AS before) q
             WHERE l.name = %(name)s""",
        {**place._asdict(), "ticket": ticket},
    ).first()
    return Turn._make(row) if row is not None else None
