"""Runs a workflow once without a fault, then again for each boundary with a process killed there, and compares."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from byrd.testing.probe import Kind, Orders
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

    ``kinds``: how many of them are "statements", "commits", "publishes", "acknowledgements", and the test's "own".
    ``tried``: how often a process was killed at one of them.  ``unreached``: those that did not come again, for
    threads race.  ``skipped``: how many were left out, as asked.

    ``pairs_found``: how many boundaries there are in the distinct recoveries from a first kill.  ``pairs_chosen``: at
    how many of them a second process was to be killed, as asked.  ``pairs_tried``: how often one was; the others did
    not come again.
    """

    boundaries: tuple[str, ...]
    kinds: Mapping[str, int]
    tried: int
    unreached: tuple[str, ...]
    skipped: int
    pairs_found: int
    pairs_chosen: int
    pairs_tried: int
    seconds: float

    def __str__(self) -> str:
        kinds = [f"{self.kinds[kind]} {kind}" for kind in Kind if kind is not Kind.OWN]
        if own := self.kinds[Kind.OWN]:
            kinds.append(f"{own} of your own")
        text = f"{len(self.boundaries)} boundaries ({', '.join(kinds)}), killed at {self.tried}"
        if self.unreached:
            text += f", {len(self.unreached)} did not come again"
        if self.skipped:
            text += f", {self.skipped} left out"
        if self.pairs_found:
            text += f"; {self.pairs_found} pairs, {self.pairs_chosen} chosen, killed at {self.pairs_tried}"
        return f"{text}; {self.seconds:.0f} s"


#: The boundaries that a process reached, in order, with their kinds.
_Reached = Mapping[str, str]
#: Where the first process is killed, and the second.
_Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one execution came to.

    ``lives``: the boundaries that each worker in turn reached.  ``lost``: how many attempts lost their worker.
    """

    state: frozenset[Any]
    submitter: _Reached
    lives: tuple[_Reached, ...]
    kills: int
    lost: int

    @property
    def reached(self) -> _Reached:
        """The boundaries of the submitter and of the first worker."""
        return {**self.submitter, **(self.lives[0] if self.lives else {})}

    @property
    def recovery(self) -> tuple[int, frozenset[str]]:
        """What tells one recovery from another: how much it found lost, and what the next worker had committed."""
        return self.lost, frozenset(name for name in self.lives[1] if "commit" in name and not _in_background(name))


class CrashPoints:
    """Kills a process at every boundary of a workflow.

    ``folder``: for logs and records.  ``pool`` and ``concurrency``: of the worker.  ``pairs``: kill a second time
    during the recovery from the first, for one first kill of each distinct recovery (the same attempts lost, the same
    commits by the worker that takes over): True for each boundary of these recoveries, a number for so many of them,
    evenly chosen, two of three from those that only recovery has.
    ``timeout``: seconds that one execution may take.  ``skip``: a regular expression; boundaries in whose names it is
    found are left out.  ``every``: of those that are left, only each so-manyth is tried.  ``only``: the name of the one
    boundary to try.
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
        every: int = 1,
        only: str | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every!r} must be 1 or more")
        self.folder, self.pool, self.concurrency = folder, pool, concurrency
        self.pairs, self.timeout, self.skip, self.every, self.only = pairs, timeout, skip, every, only
        #: One for each call, with what it was called for.
        self.reports: list[CrashReport] = []
        #: How often it was called, with or without success.
        self.calls = 0

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

        Raises ``AssertionError`` that names the boundaries after which something was wrong, or says why there was
        nothing to try.
        """
        self.calls += 1
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
        self.broker = self.engine.app.connection_for_write()
        self._numbers = count(1)

    def close(self) -> None:
        self.store.close()
        self.broker.release()

    def run(self) -> CrashReport:
        started = time.monotonic()
        warm_up(self.engine.app, self.options.pool)
        plain = self._faultless()
        names = tuple(plain.reached)
        wanted = self._chosen(names)
        unreached: list[str] = []
        recoveries: dict[tuple[int, frozenset[str]], str] = {}
        for name in wanted:
            found = self._killed_at(plain, name)
            if found is None:
                unreached.append(name)
            elif len(found.lives) > 1 and not _in_background(name):
                recoveries.setdefault(found.recovery, name)
        own, usual = self._pairs(plain, list(recoveries.values()))
        chosen = _spread(own, usual, len(own) + len(usual) if self.options.pairs is True else int(self.options.pairs))
        pairs_tried = sum(self._killed_at(plain, *pair) is not None for pair in chosen)
        self._raise()
        if len(unreached) == len(wanted):
            raise AssertionError("no process was killed, for none of these came again:\n" + "\n".join(wanted))
        return CrashReport(
            boundaries=names,
            kinds={kind.value: 0 for kind in Kind} | Counter(plain.reached.values()),
            tried=len(wanted) - len(unreached),
            unreached=tuple(unreached),
            skipped=len(names) - len(wanted),
            pairs_found=len(own) + len(usual),
            pairs_chosen=len(chosen),
            pairs_tried=pairs_tried,
            seconds=time.monotonic() - started,
        )

    def _faultless(self) -> _Trial:
        """Execute twice: only the first on a new broker or database does what none does again."""
        first, plain = self.trial(), self.trial()
        if first.state != plain.state:
            raise AssertionError(
                "two executions without a fault came to different ends; same= can say what is to be the same\n"
                + _difference(first.state, plain.state, ("the first ", "the second"))
            )
        return plain

    def _chosen(self, names: tuple[str, ...]) -> tuple[str, ...]:
        only, skip = self.options.only, self.options.skip
        there_are = "; there are:\n" + "\n".join(names)
        if only is not None:
            if only not in names:
                raise AssertionError(f"there is no boundary {only!r}{there_are}")
            return (only,)
        wanted = tuple(name for name in names if not self._is_skipped(name))
        if not wanted:
            raise AssertionError(f"skip={skip!r} leaves out every boundary{there_are}")
        return wanted[:: self.options.every]

    def _pairs(self, plain: _Trial, firsts: Sequence[str]) -> tuple[list[_Pair], list[_Pair]]:
        """Return each first with each boundary of its recovery: those that only recovery has, and the others."""
        own: list[_Pair] = []
        usual: list[_Pair] = []
        if not self.options.pairs:
            return own, usual
        for first in firsts:
            surveyed = self._attempt(plain, first, survey=True)
            if surveyed is None or len(surveyed.lives) < 2:
                continue
            for name in surveyed.lives[1]:
                if not self._is_skipped(name):
                    (usual if name in plain.reached else own).append((first, name))
        return own, usual

    def _is_skipped(self, name: str) -> bool:
        return self.options.skip is not None and re.search(self.options.skip, name) is not None

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
                raise AssertionError(
                    "the outcome is not that of an execution without a fault\n"
                    + _difference(plain.state, found.state, ("without:", "with:   "))
                )
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
                if attempt > 1:
                    self._pass_time(None, recover=False)
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
            spent, ready = folder / f"spent{life}", folder / f"worker{life}.ready"
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
                ready=ready,
            )
            orders = Orders("worker", folder / f"worker{life}", kill, spent)
            worker = Forked(work, orders=orders, log=folder / f"worker{life}.log")
            processes.append(worker)
            armed = None if kill is None or spent.exists() else spent
            faultless = kills == [None, None]
            whole = faultless or armed is not None or (survey and life == 2)
            if self._watch(worker, since, deadline, armed, (ready, orders.record) if whole else None):
                return
            if not worker.killed or not spent.exists():
                raise AssertionError(f"the worker ended by itself ({worker.poll()}):\n{worker.tail()}")
            self._pass_time(worker.pid, recover=not (patient and life == 1))

    def _watch(
        self, worker: Forked, since: datetime, deadline: float, armed: Path | None, whole: tuple[Path, Path] | None
    ) -> bool:
        """Wait until all runs are at rest (True) or the worker is dead (False).

        ``whole``: the file that the worker makes when it is ready, and where it writes its boundaries, if it is to
        reach those that come after the end, too.
        """
        while True:
            dead = worker.poll() is not None
            if armed is not None and armed.exists():
                armed = None  # a pool process died, and the worker lives
                self._pass_time(None, recover=False)
            waiting = self.store.run(_open_runs, since)
            if dead or (not waiting and (whole is None or _quiet(*whole))):
                return not waiting
            if time.monotonic() > deadline:
                raise AssertionError(self._stuck(waiting, worker))
            time.sleep(0.02)

    def _stuck(self, waiting: list[str], worker: Forked) -> str:
        why = [sentence for run_id in waiting for sentence in self.engine.get(run_id).why()]
        what = f"still open: {', '.join(waiting)}" if waiting else "all runs are at rest, but the worker is not"
        return "\n".join([f"after {self.options.timeout:.0f} s {what}", *why, worker.tail()])

    def _pass_time(self, dead_pid: int | None, *, recover: bool) -> None:
        """Let the time pass that the others wait before they give up a dead worker and its messages."""
        self.store.run(_end_lease, dead_pid)
        if recover:
            self.store.run(sweeps.recover)  # as another worker does that dies before it publishes what it found
        self.store.run(_end_patience)

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
        lives = tuple(_reached(path) for path in sorted(folder.glob("worker?")))
        state = frozenset(_frozen(self.same(run)) for run in found)
        return _Trial(state, _reached(folder / "submitter1"), lives, kills, lost)

    def _empty_queues(self) -> None:
        for name in {*self.engine.app.amqp.queues, *self.store.run(_queues, None)}:
            with contextlib.suppress(self.broker.channel_errors):
                self.broker.default_channel.queue_purge(name)


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


def _difference(one: frozenset[Any], other: frozenset[Any], titles: tuple[str, str]) -> str:
    lines = [f"  {titles[0]} {state}" for state in one - other]
    lines += [f"  {titles[1]} {state}" for state in other - one]
    return "\n".join(lines)


def _reached(record: Path) -> _Reached:
    lines = record.read_text().splitlines() if record.exists() else ()
    return {name: kind for kind, _, name in (line.partition("\t") for line in lines)}


def _quiet(ready: Path, record: Path) -> bool:
    """Tell whether the worker has come to take messages, and reaches no new boundary any more."""
    try:
        return time.time() - max(ready.stat().st_mtime, record.stat().st_mtime) > _LINGER_SECONDS
    except FileNotFoundError:
        return False


def _in_background(name: str) -> bool:
    """Tell whether a thread gets there that works beside the others, at any moment of what they do."""
    return re.match(r"\w+'s (keeper|sweeper): ", name) is not None


def _spread(own: list[_Pair], usual: list[_Pair], most: int) -> list[_Pair]:
    """Choose so many, evenly: two of three, at least, from those that only recovery has."""
    from_usual = min(max(most // 3, most - len(own)), len(usual))
    return [
        pairs[index * len(pairs) // number]
        for pairs, number in ((own, min(most - from_usual, len(own))), (usual, from_usual))
        for index in range(number)
    ]


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


def _end_lease(conn: Connection, dead_pid: int | None) -> None:
    query(
        conn,
        "UPDATE byrd.workers SET lease_until = clock_timestamp() - interval '1 second' WHERE pid = %(pid)s",
        {"pid": dead_pid},
    )


def _end_patience(conn: Connection) -> None:
    """Make wake-ups due that nobody has taken."""
    query(
        conn,
        """UPDATE byrd.steps SET wake_at = clock_timestamp()
           WHERE status = 'ready' AND run_at <= clock_timestamp() AND wake_at < 'infinity'
             AND wake_at > clock_timestamp()""",
    )
