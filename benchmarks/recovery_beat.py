"""How late a schedule fires after a fault, and how often: ``python -m benchmarks.recovery_beat``.

Embedded servers, beats of the deployment in ``beat/``.  In each trial a schedule falls due while no beat can fire it.
Measured is the time from the moment when one can (another beat says that it starts; the due time itself, when another
runs already; Postgres answers again) until the run is in Postgres.  Each due time has to be fired once.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.recovery_servers import judge
from byrd import embedded, store
from byrd.embedded import EmbeddedPostgres
from byrd.errors import ByrdError

_ROOT = Path(__file__).resolve().parent.parent
_APP = "benchmarks.recovery_beat_app"
_WAIT_SECONDS = 60.0
#: How long after it was made a trial's schedule is due.
_SOON_SECONDS = 3.0
#: What is to be reached, in seconds.
FIGURE = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Field:
    """What a trial works with."""

    postgres: EmbeddedPostgres
    folder: Path

    @contextmanager
    def beat(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run a beat; it is there once it says so, and killed in the end."""
        log = self.folder / f"beat-{secrets.token_hex(4)}.log"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            _APP,
            "beat",
            "-S",
            "beat.scheduler:ByrdScheduler",
            "-l",
            "INFO",
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait_until(lambda: b"beat: Starting" in log.read_bytes(), lambda: log.read_text(errors="replace"))
            yield process
        finally:
            process.kill()
            process.wait()


def _killed(field: Field) -> float:
    """The only beat is killed, the due time passes, another beat starts."""
    with field.beat() as beat:
        due = _schedule()
        beat.kill()
    _wait_for(due)
    with field.beat():
        began = time.time()
        return max(0.0, _fired(due) - began)


def _killed_beside_another(field: Field) -> float:
    """One of two beats is killed right before the due time."""
    with field.beat() as beat, field.beat():
        due = _schedule()
        _wait_for(due - timedelta(seconds=0.2))
        beat.kill()
        return _fired(due) - due.timestamp()


def _postgres_away(field: Field) -> float:
    """Postgres is away when the schedule falls due."""
    with field.beat():
        due = _schedule()
        field.postgres.kill()
        _wait_for(due + timedelta(seconds=1))
        field.postgres.start()
        answers = time.time()
        return _fired(due) - answers


FAULTS: dict[str, Callable[[Field], float]] = {
    "beat killed, another started after the due time": _killed,
    "beat killed, another runs": _killed_beside_another,
    "Postgres away at the due time": _postgres_away,
}


def measure(*, trials: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    """Have each fault strike again and again; return the seconds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="byrd-recovery-")))
        postgres = stack.enter_context(embedded.postgres())
        broker = stack.enter_context(embedded.valkey())
        os.environ.update(
            BYRD_DATABASE_URL=postgres.url, BYRD_BROKER_URL=broker.url, BYRD_APP=_APP, BYRD_STATE_DIR=str(folder),
            DJANGO_SETTINGS_MODULE="beat.settings",
        )  # fmt: skip
        store.migrate(postgres.url)
        _set_up_django()
        field = Field(postgres, folder)
        found: dict[str, list[float]] = {fault: [] for fault in FAULTS}
        for fault, strike in FAULTS.items():
            for number in range(trials):
                progress(f"{fault}: {number + 1} of {trials}")
                found[fault].append(strike(field))
        _check_once()
        return found


def _set_up_django() -> None:
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0, interactive=False)


def _schedule() -> datetime:
    """Make a schedule that is due soon, and then a day later; return when."""
    from django_celery_beat.models import IntervalSchedule, PeriodicTask

    due = datetime.now(UTC) + timedelta(seconds=_SOON_SECONDS)
    interval, _ = IntervalSchedule.objects.get_or_create(every=1, period=IntervalSchedule.DAYS)
    PeriodicTask.objects.create(
        name=f"at {due.isoformat()}", task="byrd.submit", args=json.dumps(["recovery.tick", "tick"]), interval=interval,
        start_time=due,
    )  # fmt: skip
    return due


def _fired(due: datetime) -> float:
    """Wait for the run of that due time; return when it was written."""
    found: float = _wait_until(lambda: _written(due), lambda: f"the due time {due} was not fired")
    return found


def _written(due: datetime) -> float | None:
    rows = _query(
        "SELECT extract(epoch FROM created_at) FROM byrd.runs WHERE key LIKE %s", [f"schedule:%:{due.isoformat()}"]
    )
    return float(rows[0][0]) if rows else None


def _check_once() -> None:
    """Each due time has one run; a beat that was killed right after it has not counted it."""
    [(runs, keys)] = _query("SELECT count(*), count(DISTINCT key) FROM byrd.runs", [])
    counts = _query("SELECT total_run_count FROM beat.django_celery_beat_periodictask WHERE task = 'byrd.submit'", [])
    if runs != keys or any(count > 1 for (count,) in counts) or len(counts) != runs:
        raise BenchmarkError(f"{len(counts)} due times were fired as {runs} runs: {counts}")


def _query(sql: str, params: list[Any]) -> list[Any]:
    from django.db import connection
    from django.db.utils import InterfaceError, OperationalError

    try:
        with connection.cursor() as cursor:
            cursor.execute(sql, params)
            return list(cursor.fetchall())
    except (OperationalError, InterfaceError):  # Postgres starts just now
        connection.close()
        return []


def _wait_for(moment: datetime) -> None:
    time.sleep(max(0.0, moment.timestamp() - time.time()))


def _wait_until(condition: Callable[[], T | None], what: Callable[[], str]) -> T:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {_WAIT_SECONDS:g} s in vain: {what()}")
        time.sleep(0.01)
    return found


@click.command(help=__doc__)
@click.option(
    "--trials", default=5, show_default=True, type=click.IntRange(min=1), help="How often each fault strikes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the seconds of each trial as JSON.")
@click.option(
    "--tolerate", type=click.FloatRange(1), default=1.0, show_default=True, help="Times the figure, on a busy machine."
)
def main(*, trials: int, as_json: bool, tolerate: float) -> None:
    """Print a table."""
    console = Console(stderr=as_json)
    try:
        with console.status("Starting the servers") as status:
            found = measure(trials=trials, progress=status.update)
    except (BenchmarkError, ByrdError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(console, found)
    judge({fault: (FIGURE, seconds) for fault, seconds in found.items()}, tolerate)


def _show(console: Console, found: Mapping[str, Sequence[float]]) -> None:
    trials = len(next(iter(found.values())))
    table = Table("fault", "figure to reach", "median", "longest", f"of {trials} trials", title="From there to the run")
    for fault, seconds in found.items():
        kept = "kept" if max(seconds) <= FIGURE else "MISSED"
        table.add_row(
            fault,
            f"{FIGURE:g} s",
            f"{statistics.median(seconds):.2f} s",
            f"{max(seconds):.2f} s",
            f"fired once each, {kept}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
