"""Runs a workflow once without a fault, then again for each boundary with a process killed there, and compares."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from byrd.engine import Byrd, Run
from byrd.store import Store, sweeps
from byrd.store.rows import query
from byrd.testing.invariants import check_invariants
from byrd.testing.probe import Orders
from byrd.testing.process import Forked, run_worker, warm_up

#: A worker that lives on after all runs have ended may still have boundaries to reach: an acknowledgement, a sweep.
_LINGER_SECONDS = 0.4
#: Threads race: a boundary that was not reached is tried again this often.
_TRIES = 3
_MOST_FAILURES = 5
#: What tells two executions of one plan apart.
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_AT_REST = "('succeeded','failed','cancelled','rollback_stuck')"


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What was tried.  ``boundaries``: those of the faultless execution, in order.

    ``tried``: how often a process was killed at one of them.  ``unreached``: those that did not come again, for
    threads race.  ``skipped``: how many were left out, as asked.  ``pairs``: how often a second process was killed
    during the recovery from the first; ``pairs_found``: how many such pairs there are.
    """

    boundaries: tuple[str, ...]
    tried: int
    unreached: tuple[str, ...]
    skipped: int
    pairs: int
    pairs_found: int
    seconds: float

    def __str__(self) -> str:
        text = f"{len(self.boundaries)} boundaries, killed at {self.tried}"
        if self.unreached:
            text += f", {len(self.unreached)} did not come again"
        if self.skipped:
            text += f", {self.skipped} left out"
        if self.pairs_found:
            text += f"; {self.pairs} of {self.pairs_found} pairs"
        return f"{text}; {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one execution came to.  ``lives``: the boundaries that each worker in turn reached."""

    state: frozenset[Any]
    submitter: tuple[str, ...]
    lives: tuple[tuple[str, ...], ...]
    kills: int


class CrashPoints:
    """Kills a process at every boundary of a workflow.

    ``folder``: for logs and records.  ``pool`` and ``concurrency``: of the worker.  ``pairs``: kill a second time
    during the recovery from the first: True for each pair, a number for so many of them, evenly chosen.
    ``timeout``: seconds that one execution may take.  ``skip``: a regular expression; boundaries in whose names it is
    found are left out.  ``only``: the name of the one boundary to try.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pool: str = "solo",
        concurrency: int = 1,
        pairs: bool | int = False,
        timeout: float = 60.0,
        skip: str | None = None,
        only: str | None = None,
    ) -> None:
        self.folder, self.pool, self.concurrency = folder, pool, concurrency
        self.pairs, self.timeout, self.skip, self.only = pairs, timeout, skip, only
        #: One for each call, with what it was called for.
        self.reports: list[CrashReport] = []

    def __call__(
        self,
        engine: Byrd,
        scenario: Callable[[], Any],
        *,
        check: Callable[[Run], object] | None = None,
        reset: Callable[[], object] | None = None,
        same: Callable[[Run], Any] | None = None,
    ) -> CrashReport:
        """Try ``scenario`` once for each boundary; return what was tried.

        ``scenario()`` submits: it returns a run, several, or a canvas to submit; or None, and its runs are those that
        it left in the database, which should be the test's own.  It is called in a process of its own, which is
        killed at its boundaries too; then it is called again, as its caller would do, so it should give a ``key``.
        A worker of the engine's app, in another process, does the work.  ``reset()`` is called before each execution,
        ``check(run)`` after it, for each run.  ``same(run)`` returns what must be the same as without a fault (a JSON
        value or other hashable); by default that is the run's status, value, error, and the status of each step.

        Raises ``AssertionError`` that names the boundaries after which something was wrong.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        series = _Series(self, engine, scenario, check or _nothing, reset or _nothing, same or _state)
        try:
            report = series.run()
        finally:
            series.close()
        self.reports.append(report)
        return report


@dataclass
class _Series:
    """All executions of one scenario."""

    options: CrashPoints
    engine: Byrd
    scenario: Callable[[], Any]
    check: Callable[[Run], object]
    reset: Callable[[], object]
    same: Callable[[Run], Any]
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.engine.runtime.store.url)
        self._numbers = count(1)

    def close(self) -> None:
        self.store.close()

    def run(self) -> CrashReport:
        started = time.monotonic()
        warm_up(self.engine.app, self.options.pool)
        plain = self.trial()
        names = tuple(dict.fromkeys([*plain.submitter, *(plain.lives[0] if plain.lives else ())]))
        tried = 0
        unreached: list[str] = []
        recoveries: dict[frozenset[str], str] = {}
        wanted = self._chosen(names)
        for name in wanted:
            found = self._killed_at(plain, name)
            if found is None:
                unreached.append(name)
                continue
            tried += 1
            if len(found.lives) > 1:
                recoveries.setdefault(_commits(found.lives[1]), name)
        pairs = self._pairs(plain, list(recoveries.values()))
        chosen = _spread(pairs, self.options.pairs)
        second = sum(self._killed_at(plain, *pair) is not None for pair in chosen)
        self._raise()
        seconds = time.monotonic() - started
        skipped = len(names) - len(wanted)
        return CrashReport(names, tried, tuple(unreached), skipped, second, len(pairs), seconds)

    def _chosen(self, names: tuple[str, ...]) -> tuple[str, ...]:
        only, skip = self.options.only, self.options.skip
        if only is None:
            return tuple(name for name in names if skip is None or not re.search(skip, name))
        if only not in names:
            raise AssertionError(f"there is no boundary {only!r}; there are:\n" + "\n".join(names))
        return (only,)

    def _pairs(self, plain: _Trial, firsts: Sequence[str]) -> list[tuple[str, str]]:
        """Return the second boundaries for each first: one first for each distinct recovery, its own part in front."""
        if not self.options.pairs:
            return []
        usual = {*plain.submitter, *plain.lives[0]}
        own: list[tuple[str, str]] = []
        rest: list[tuple[str, str]] = []
        for first in firsts:
            surveyed = self._attempt(plain, first, survey=True)
            if surveyed is None or len(surveyed.lives) < 2:
                continue
            for name in dict.fromkeys(surveyed.lives[1]):
                (rest if name in usual else own).append((first, name))
        return own + rest

    def _killed_at(self, plain: _Trial, first: str, then: str | None = None) -> _Trial | None:
        """Return the trial, or None when the boundary was not reached."""
        for _ in range(_TRIES):
            found = self._attempt(plain, first, then)
            if found is None or found.kills == (1 if then is None else 2):
                return found
        return None

    def _attempt(self, plain: _Trial, first: str, then: str | None = None, *, survey: bool = False) -> _Trial | None:
        where = f"killed at {first!r}" + (f", and again at {then!r}" if then else "")
        try:
            found = self.trial(first, then, survey=survey)
            if found.state != plain.state:
                raise AssertionError(_difference(plain.state, found.state))
        except AssertionError as exc:
            self.failures.append(f"{where}: {exc}")
            if len(self.failures) >= _MOST_FAILURES:
                self._raise()
            return None
        return found

    def _raise(self) -> None:
        if self.failures:
            again = "Try one alone with --byrd-crash-point='NAME'."
            raise AssertionError("\n\n".join([*self.failures, again]))

    # -- one execution ---------------------------------------------------------------------------

    def trial(self, kill: str | None = None, then: str | None = None, *, survey: bool = False) -> _Trial:
        """Execute the scenario once.  ``survey``: leave recovery to the second worker, as with ``then``."""
        self.reset()
        self._empty_queues()
        number, since = next(self._numbers), self.store.run(_now)
        folder = self.options.folder / f"{number:04}"
        folder.mkdir()
        processes: list[Forked] = []
        try:
            self._submit(processes, folder, kill)
            patient = survey or then is not None
            self._work(processes, folder, since, [kill, then], survey=survey)
            kills = sum((folder / f"spent{n}").exists() for n in (1, 2))
            return self._checked(folder, since, kills, strict=not patient)
        finally:
            for process in processes:
                process.end()

    def _submit(self, processes: list[Forked], folder: Path, kill: str | None) -> None:
        for attempt in (1, 2):
            orders = Orders("submitter", folder / f"submitter{attempt}", kill, folder / "spent1")
            process = Forked(self._call_scenario, orders=orders, log=folder / "submitter.log")
            processes.append(process)
            process.wait(self.options.timeout)
            if not process.killed:
                _ = process.answer  # raises what it raised
                return
        raise AssertionError(f"the submitter was killed twice:\n{processes[-1].tail()}")

    def _call_scenario(self) -> list[str]:
        made = self.scenario()
        found = made if isinstance(made, list | tuple) and all(isinstance(run, Run) for run in made) else [made]
        return [
            (one if isinstance(one, Run) else self.engine.submit(one)).id
            for one in found
            if one is not None
        ]  # fmt: skip

    def _work(
        self, processes: list[Forked], folder: Path, since: datetime, kills: list[str | None], *, survey: bool
    ) -> None:
        """Start workers, one after the other's death, until all runs are at rest."""
        patient = survey or kills[1] is not None
        deadline = time.monotonic() + self.options.timeout
        queues = sorted({*self.engine.app.amqp.queues, *self.store.run(_queues, since)})
        for life in count(1):
            kill = kills[life - 1] if life <= len(kills) else None
            spent = folder / f"spent{life}"
            settings = {"byrd_sweep_seconds": 0.05}
            if patient and life == 2:
                settings["byrd_lease_seconds"] = 1.0
            work = partial(
                run_worker,
                self.engine.app,
                pool=self.options.pool,
                concurrency=self.options.concurrency,
                queues=queues,
                settings=settings,
            )
            orders = Orders("worker", folder / f"worker{life}", kill, spent)
            worker = Forked(work, orders=orders, log=folder / f"worker{life}.log")
            processes.append(worker)
            armed = None if kill is None or spent.exists() else spent
            faultless = kills == [None, None]
            whole = faultless or armed is not None or (survey and life == 2)
            if self._watch(worker, since, deadline, armed, orders.record if whole else None):
                return
            if not worker.killed or not spent.exists():
                raise AssertionError(f"the worker ended by itself ({worker.poll()}):\n{worker.tail()}")
            self._pass_time(worker.pid, recover=not (patient and life == 1))

    def _watch(self, worker: Forked, since: datetime, deadline: float, armed: Path | None, record: Path | None) -> bool:
        """Wait until all runs are at rest (True) or the worker is dead (False).

        ``record``: where the worker writes its boundaries, if it is to reach those that come after the end, too.
        """
        while True:
            dead = worker.poll() is not None
            if armed is not None and armed.exists():
                armed = None  # a pool process died, and the worker lives
                self._pass_time(None, recover=False)
            waiting = self.store.run(_open_runs, since)
            if dead or (not waiting and (record is None or _quiet(record))):
                return not waiting
            if waiting and time.monotonic() > deadline:
                raise AssertionError(self._stuck(waiting, worker))
            time.sleep(0.02)

    def _stuck(self, waiting: list[str], worker: Forked) -> str:
        why = [sentence for run_id in waiting for sentence in self.engine.get(run_id).why()]
        return "\n".join([f"after {self.options.timeout:.0f} s still open: {', '.join(waiting)}", *why, worker.tail()])

    def _pass_time(self, dead_pid: int | None, *, recover: bool) -> None:
        """Let the time pass that the others wait before they give up a dead worker and its messages."""
        self.store.run(_let_time_pass, dead_pid)
        if recover:
            _, wakeups = self.store.run(sweeps.recover)
            del wakeups  # nobody publishes them: the next worker's relay finds the steps

    def _checked(self, folder: Path, since: datetime, kills: int, *, strict: bool) -> _Trial:
        self.store.run(check_invariants)
        found = [Run(self.engine, run_id) for run_id in self.store.run(_runs, since)]
        if not found:
            raise AssertionError("the scenario left no run in the database")
        lost = self.store.run(_preemptions, since)
        if strict and lost > kills:
            raise AssertionError(f"{lost} attempts lost their worker, but only {kills} processes were killed")
        for run in found:
            self.check(run)
        lives = tuple(_lines(path) for path in sorted(folder.glob("worker?")))
        state = frozenset(_frozen(self.same(run)) for run in found)
        return _Trial(state, _lines(folder / "submitter1"), lives, kills)

    def _empty_queues(self) -> None:
        app = self.engine.app
        with app.connection_for_write() as connection:
            for name in {*app.amqp.queues, *self.store.run(_queues, None)}:
                with contextlib.suppress(connection.channel_errors):
                    connection.default_channel.queue_purge(name)


# -- what must be the same -------------------------------------------------------------------------


def _state(run: Run) -> Any:
    row, steps = run.info, run.steps()
    output = next((step for step in steps if step.no == row.output), None)
    return {
        "workflow": row.workflow,
        "status": row.status,
        "value": output.result if output else None,
        "error": row.error,
        "steps": [f"{step.no} {step.kind} {step.task or ''} {step.status}" for step in steps],
    }


def _frozen(value: Any) -> Any:
    """Return a value that can be a member of a set, without ids."""
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return _ID.sub("<id>", value) if isinstance(value, str) else value


def _difference(wanted: Iterable[Any], found: Iterable[Any]) -> str:
    expected, got = set(wanted), set(found)
    lines = ["the outcome is not that of an execution without a fault"]
    lines += [f"  without: {state}" for state in expected - got]
    lines += [f"  with:    {state}" for state in got - expected]
    return "\n".join(lines)


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text().splitlines()) if path.exists() else ()


def _quiet(record: Path) -> bool:
    """Tell whether the worker has been at its boundaries, and reaches no new one any more."""
    try:
        return time.time() - record.stat().st_mtime > _LINGER_SECONDS
    except FileNotFoundError:
        return False


def _commits(names: Iterable[str]) -> frozenset[str]:
    """Return what a worker had committed: what tells one recovery from another."""
    return frozenset(name for name in names if "sweeper" not in name and "keeper" not in name and "commit" in name)


def _spread(pairs: list[tuple[str, str]], wanted: int) -> Iterator[tuple[str, str]]:
    """Choose so many, evenly; all for True."""
    number = len(pairs) if wanted is True else min(int(wanted), len(pairs))
    return (pairs[index * len(pairs) // number] for index in range(number))


def _nothing(*_: Any) -> None:
    """Check or reset nothing."""


# -- questions to the database ---------------------------------------------------------------------


def _now(conn: Connection) -> datetime:
    found: datetime = query(conn, "SELECT clock_timestamp()").scalar_one()
    return found


def _runs(conn: Connection, since: datetime) -> list[str]:
    sql = "SELECT id::text FROM byrd.runs WHERE created_at >= %(since)s ORDER BY created_at"
    return list(query(conn, sql, {"since": since}).scalars())


def _open_runs(conn: Connection, since: datetime) -> list[str]:
    sql = f"SELECT id::text FROM byrd.runs WHERE created_at >= %(since)s AND status NOT IN {_AT_REST}"
    return list(query(conn, sql, {"since": since}).scalars())


def _queues(conn: Connection, since: datetime | None) -> list[str]:
    sql = """SELECT DISTINCT s.queue FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE s.queue IS NOT NULL AND r.created_at >= coalesce(%(since)s, '-infinity'::timestamptz)"""
    return list(query(conn, sql, {"since": since}).scalars())


def _preemptions(conn: Connection, since: datetime) -> int:
    sql = """SELECT coalesce(sum(s.preemptions), 0) FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE r.created_at >= %(since)s"""
    return int(query(conn, sql, {"since": since}).scalar_one())


def _let_time_pass(conn: Connection, dead_pid: int | None) -> None:
    """End the lease of a dead worker, and make wake-ups due that nobody has taken."""
    query(
        conn,
        "UPDATE byrd.workers SET lease_until = clock_timestamp() - interval '1 second' WHERE pid = %(pid)s",
        {"pid": dead_pid},
    )
    query(
        conn,
        """UPDATE byrd.steps SET wake_at = clock_timestamp()
           WHERE status = 'ready' AND run_at <= clock_timestamp() AND wake_at < 'infinity'
             AND wake_at > clock_timestamp()""",
    )
