"""How soon work goes on after a server failed: ``python -m benchmarks.recovery_servers``.

Embedded servers, one worker (prefork, 2 processes) with Byrd's default settings.  In each trial two steps run, and
others wait as messages in Redis, when the fault strikes.  Measured is the time from the moment when the server answers
again to the start of the *next* of the steps that were ready by then, and to the start of the *last* of them.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import redis
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from byrd import embedded, store
from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from byrd.errors import ByrdError
from byrd.store.rows import query

_ROOT = Path(__file__).resolve().parent.parent
_WAIT_SECONDS = 90.0
_HELD, _QUEUED, _CHAIN = 2, 20, 3
#: What is to be reached, in seconds.
FIGURE = 5.0

T = TypeVar("T")
Servers = tuple[EmbeddedPostgres, EmbeddedValkey]


def _flush(servers: Servers) -> None:
    with redis.Redis.from_url(servers[1].url) as client:
        client.flushall()


def _restart_empty(servers: Servers) -> None:
    servers[1].kill()
    servers[1].start()


#: Each returns when the server answers again.
FAULTS: dict[str, Callable[[Servers], object]] = {
    "Redis flushed": _flush,
    "Redis restarted empty": _restart_empty,
    "Postgres restarted (fast)": lambda servers: servers[0].restart("fast"),
    "Postgres restarted (immediate)": lambda servers: servers[0].restart("immediate"),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """Seconds from the server's first answer to the next start of a step, and to the last of those that were ready."""

    next: float
    last: float


def measure(faults: Sequence[str], *, trials: int, progress: Callable[[str], None]) -> dict[str, list[Trial]]:
    """Have each fault strike the same servers and the same worker again and again."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="byrd-recovery-")))
        servers = (stack.enter_context(embedded.postgres()), stack.enter_context(embedded.valkey(persistence=False)))
        store.migrate(servers[0].url)
        os.environ.update(BYRD_DATABASE_URL=servers[0].url, BYRD_BROKER_URL=servers[1].url)
        from benchmarks import recovery_app

        stack.callback(recovery_app.app.close)
        stack.callback(recovery_app.engine.close)
        log = folder / "worker.log"
        worker = stack.enter_context(start_worker(log))
        found: dict[str, list[Trial]] = {fault: [] for fault in faults}
        for fault in faults:
            for number in range(trials):
                progress(f"{fault}: {number + 1} of {trials}")
                found[fault].append(_trial(recovery_app, FAULTS[fault], servers, folder / f"{fault}-{number}"))
                if worker.poll() is not None:
                    said = log.read_text(errors="replace")
                    raise BenchmarkError(f"the worker ended ({worker.returncode}). Its log says:\n{said}")
        return found


def _trial(load: Any, fault: Callable[[Servers], object], servers: Servers, go: Path) -> Trial:
    engine = load.engine
    runs = [engine.submit(load.hold.s(str(go)) | load.add_one.s()) for _ in range(_HELD)]
    # Each in a process of its own: one may have claimed both, and gives one back when it sees how long they take.
    wait_until(lambda: len({run.steps()[0].pid for run in runs} - {None}) == _HELD)
    for number in range(_QUEUED):
        # With headers it needs its message; else a process that is awake would find it without.
        canvas = load.add_one.s(number).set(headers={"needs": "its message"})
        for _ in range(_CHAIN - 1):
            canvas |= load.add_one.s()
        runs.append(engine.submit(canvas))
    fault(servers)
    answers = time.time()
    go.touch()
    results = [run.get(timeout=_WAIT_SECONDS) for run in runs]
    if results != [1] * _HELD + [number + _CHAIN for number in range(_QUEUED)]:
        raise BenchmarkError(f"the runs gave {results}")
    found: Trial = engine.runtime.store.run(_starts, answers)
    return found


def _starts(conn: Any, answers: float) -> Trial:
    row = query(
        conn,
        """SELECT extract(epoch FROM min(started_at)) AS next, extract(epoch FROM max(started_at)) AS last
             FROM byrd.steps WHERE started_at > to_timestamp(%(answers)s) AND ready_at <= to_timestamp(%(answers)s)""",
        {"answers": answers},
    ).one()
    if row.next is None:
        raise BenchmarkError("all steps were done before the fault was over: nothing was struck")
    return Trial(float(row.next) - answers, float(row.last) - answers)


@contextmanager
def start_worker(log: Path, name: str = "recovery@bench") -> Iterator[subprocess.Popen[bytes]]:
    """Have a worker of the app, with the settings that Byrd gives it."""
    command = [
        sys.executable, "-m", "celery", "-A", "benchmarks.recovery_app", "worker",
        "-n", name, "-P", "prefork", "-c", "2", "-l", "INFO",
    ]  # fmt: skip
    with log.open("wb") as output:
        worker = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: b" ready." in log.read_bytes())
        yield worker
    finally:
        worker.terminate()
        try:
            worker.wait(15)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def wait_until(condition: Callable[[], T | None]) -> T:
    """Call ``condition`` until it returns something true, and return that."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"nothing happened for {_WAIT_SECONDS:g} s")
        time.sleep(0.02)
    return found


def show(console: Console, results: Mapping[str, Sequence[Trial]]) -> None:
    """Print the table."""
    table = Table(title="From the server's answer to the start of a step, in seconds", title_justify="left")
    table.add_column("fault", no_wrap=True)
    table.add_column("to reach", justify="right")
    for name in ("next: median", "max", "last: median", "max"):
        table.add_column(name, justify="right")
    for fault, trials in results.items():
        cells = []
        for values in ([trial.next for trial in trials], [trial.last for trial in trials]):
            cells += [f"{statistics.median(values):.2f}", f"{max(values):.2f}"]
        table.add_row(fault, f"{FIGURE:g}", *cells)
    console.print(table)
    console.print(
        f"{len(next(iter(results.values())))} trials each; {_HELD} steps ran and {_QUEUED} waited in Redis; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs.",
        style="dim",
    )


def judge(results: Mapping[str, tuple[float, Sequence[float]]], tolerate: float) -> None:
    """Raise unless each fault's longest time is within its figure, times ``tolerate``."""
    late = [
        f"{fault}: {max(seconds):.2f} s"
        for fault, (figure, seconds) in results.items()
        if max(seconds) > figure * tolerate
    ]
    if late:
        raise click.ClickException(f"later than the figure to reach: {', '.join(late)}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trials", type=click.IntRange(1), default=5, show_default=True, help="How often each fault strikes.")
@click.option("--fault", "only", type=click.Choice(list(FAULTS)), multiple=True, help="Only this one; may be repeated.")
@click.option(
    "--tolerate", type=click.FloatRange(1), default=1.0, show_default=True, help="Times the figure, on a busy machine."
)
def main(trials: int, only: tuple[str, ...], tolerate: float) -> None:
    """Measure how soon steps start after Redis or Postgres failed; exit 1 if the next one starts too late."""
    logging.getLogger("byrd").setLevel(logging.ERROR)  # that a server is away is no news here
    console = Console()
    try:
        with console.status("starting") as status:
            results = measure(only or tuple(FAULTS), trials=trials, progress=status.update)
    except (BenchmarkError, ByrdError) as error:
        raise click.ClickException(str(error)) from None
    show(console, results)
    judge({fault: (FIGURE, [trial.next for trial in trials]) for fault, trials in results.items()}, tolerate)


if __name__ == "__main__":
    main()
