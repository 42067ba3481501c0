"""Whether a worker's memory and connections stay flat: ``python -m benchmarks.endurance``.

One real worker (prefork, 2 processes) runs chains, chords, retries, failures, replacements and checkpoints, and is
looked at all the while; with ``--items`` it runs one each over so many items instead.  Memory is the resident set: what
belongs to a process alone (USS) grows for a while in any pool, as pages that were shared with the main process are
written to.  A process is flat when it grows by less than a given number of bytes per step, by the median of the slopes
between all pairs of samples: single jumps do not count.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import redis
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from byrd import embedded
from byrd.store import Store, migrate
from byrd.store.rows import query

ROOT = Path(__file__).resolve().parent.parent
STEPS, CONCURRENCY = 50_000, 2
#: Bytes per step below which a process is flat.  Over 50,000 steps: 2.5 MB, or half of it in a pool process.
FLAT_BYTES = 50.0
#: The part of the steps that comes before memory is judged: caches fill, pools connect.
WARM_UP = 0.3
#: A pool opens one more connection when two threads want one at once for the first time, however late; a leak goes on.
MOST_NEW = 2
_OUTSTANDING_RUNS = 60
_READY_SECONDS = 90.0
_STILL_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The worker at one moment: memory in bytes of the main process and of each child, connections, open files.

    ``open``: how many steps have not ended.
    """

    steps: int
    open: int
    main: int
    children: tuple[int, ...]
    postgres: int
    redis: int
    files: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen."""

    samples: Sequence[Sample]
    seconds: float

    @property
    def judged(self) -> list[Sample]:
        """The samples after the warm-up."""
        return [sample for sample in self.samples if sample.steps >= WARM_UP * self.samples[-1].steps]

    def slopes(self) -> dict[str, float]:
        """Return by how many bytes each process grew after the warm-up, per step that it had to do with."""
        found = {"main": _slope([(sample.steps, sample.main) for sample in self.judged])}
        for number in range(len(self.judged[0].children)):
            points = [(sample.steps, sample.children[number]) for sample in self.judged]
            found[f"child {number + 1}"] = _slope(points) * CONCURRENCY  # each of them runs its share only
        return found

    def growth(self) -> dict[str, int]:
        """Return how many connections and files more there are at least in the second half of what is judged."""
        half = len(self.judged) // 2
        return {
            name: min(getattr(sample, name) for sample in self.judged[half:])
            - min(getattr(sample, name) for sample in self.judged[:half])
            for name in ("postgres", "redis", "files")
        }

    def flat(self, *, bytes_per_step: float = FLAT_BYTES) -> bool:
        """Tell whether nothing grows."""
        flat_memory = all(slope < bytes_per_step for slope in self.slopes().values())
        return flat_memory and max(self.growth().values()) <= MOST_NEW


def _slope(points: Sequence[tuple[int, int]]) -> float:
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x2 > x1]
    return statistics.median(slopes)


def endure(
    database_url: str,
    broker_url: str,
    *,
    steps: int = STEPS,
    items: int = 0,
    look_seconds: float = 2.0,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Have a worker run this many attempts at steps on migrated, otherwise idle servers, and look at it meanwhile.

    ``items``: or one each over so many items.
    """
    store = Store(database_url)
    urls = {"BYRD_DATABASE_URL": database_url, "BYRD_BROKER_URL": broker_url}
    with _environment(urls), tempfile.TemporaryDirectory(prefix="byrd-endurance-") as folder:
        from benchmarks import endurance_app as load

        with _worker(Path(folder) / "worker.log", {**os.environ, **(environment or {})}) as worker:
            _wait_until_ready(worker, store)
            began = time.monotonic()
            fed = _items_of_one_run(store, load, items) if items else _runs_of_all_kinds(store, load, steps)
            samples = list(_samples(worker, store, broker_url, fed, look_seconds=look_seconds))
            report = Report(samples, time.monotonic() - began)
        load.engine.close()
        load.app.close()
        sys.modules.pop(load.__name__)
        del sys.modules["benchmarks"].endurance_app
    store.close()
    return report


def _runs_of_all_kinds(store: Store, load: Any, steps: int) -> Iterator[int]:
    """Submit runs, never many at once, until so many attempts were made; yield how many there are so far."""
    done = 0
    while done < steps:
        done, open_runs = store.run(_progress)
        while open_runs < _OUTSTANDING_RUNS:
            for canvas in load.canvases():
                load.engine.submit(canvas)
                open_runs += 1
        yield done


def _items_of_one_run(store: Store, load: Any, items: int) -> Iterator[int]:
    """Submit one each over so many items; yield how many have ended so far, until the run has."""
    run = load.engine.submit(load.over(items))
    while not run.status.final:
        yield store.run(_items_done)
    if run.status != "succeeded":
        raise BenchmarkError(f"the each ended as {run.status}: {' '.join(run.why())}")
    yield items


def _samples(
    worker: psutil.Process, store: Store, broker_url: str, fed: Iterator[int], *, look_seconds: float
) -> Iterator[Sample]:
    """Have the worker fed, until that is over; look every few seconds, and at the end."""
    children = sorted(worker.children(), key=lambda child: child.pid)
    next_look, last, since = time.monotonic(), -1, time.monotonic()
    processes = [worker, *children]
    with redis.Redis.from_url(broker_url) as client:

        def sample() -> Sample:
            return Sample(
                steps=last,
                open=store.run(_open_steps),
                main=worker.memory_info().rss,
                children=tuple(child.memory_info().rss for child in children),
                postgres=store.run(_connections),
                redis=len(client.client_list()),
                files=sum(process.num_fds() for process in processes),
            )

        for done in fed:
            if done != last:
                last, since = done, time.monotonic()
            elif time.monotonic() - since > _STILL_SECONDS or not worker.is_running():
                raise BenchmarkError(f"the worker made no step for {_STILL_SECONDS:g} s, after {done:,} steps")
            if time.monotonic() >= next_look:
                next_look += look_seconds
                yield sample()
            time.sleep(0.1)
        yield sample()


def _progress(conn: Any) -> tuple[int, int]:
    row = query(
        conn,
        """SELECT (SELECT coalesce(sum(attempt), 0) FROM byrd.steps) AS done,
                  (SELECT count(*) FROM byrd.runs WHERE finished_at IS NULL) AS open""",
    ).one()
    return int(row.done), int(row.open)


def _items_done(conn: Any) -> int:
    sql = "SELECT coalesce(sum(completed + failed), 0) FROM byrd.checkpoints WHERE name = 'items'"
    return int(query(conn, sql).scalar_one())


def _open_steps(conn: Any) -> int:
    sql = "SELECT count(*) FROM byrd.steps WHERE status IN ('pending','ready','running','waiting')"
    return int(query(conn, sql).scalar_one())


def _connections(conn: Any) -> int:
    return int(query(conn, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()").scalar_one())


@contextmanager
def _worker(log: Path, environment: Mapping[str, str]) -> Iterator[psutil.Process]:
    command = [
        sys.executable, "-m", "celery", "-A", "benchmarks.endurance_app", "worker", "--loglevel", "WARNING",
        "--pool", "prefork", "--concurrency", str(CONCURRENCY), "--hostname", "endurance@%h",
    ]  # fmt: skip
    with log.open("wb") as output:
        popen = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield psutil.Process(popen.pid)
    except BenchmarkError as error:
        raise BenchmarkError(f"{error}. The worker's log:\n{log.read_text(errors='replace')[-2000:]}") from None
    finally:
        os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()


def _wait_until_ready(worker: psutil.Process, store: Store) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not store.run(lambda conn: query(conn, "SELECT 1 FROM byrd.workers").first()):
        if time.monotonic() > deadline or worker.status() == psutil.STATUS_ZOMBIE:
            raise BenchmarkError(f"the worker holds no lease after {_READY_SECONDS:g} s")
        time.sleep(0.1)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def table_of(report: Report, *, rows: int = 20) -> Table:
    """Return some of the samples, evenly spread, as a table."""
    table = Table("steps", "open", "main", box=None, header_style="dim")
    for number in range(len(report.samples[0].children)):
        table.add_column(f"child {number + 1}")
    for name in ("Postgres", "Redis", "files"):
        table.add_column(name, justify="right")
    every = max(1, len(report.samples) // rows)
    for sample in [*report.samples[:-1:every], report.samples[-1]]:
        memory = [f"{used / 2**20:.1f} MB" for used in (sample.main, *sample.children)]
        table.add_row(
            f"{sample.steps:,}", f"{sample.open:,}", *memory, str(sample.postgres), str(sample.redis), str(sample.files)
        )
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", type=click.IntRange(1000), default=STEPS, show_default=True, help="Attempts at steps.")
@click.option("--items", type=click.IntRange(1000), default=None, help="One each over so many items, instead.")
def main(steps: int, items: int | None) -> None:
    """Watch a worker's memory and connections over many steps; the exit status says whether they stayed flat."""
    console = Console()
    with embedded.postgres(in_memory=True) as postgres, embedded.valkey(persistence=False) as broker:
        migrate(postgres.url)
        try:
            with console.status(f"running {items:,} items" if items else f"running {steps:,} steps"):
                report = endure(postgres.url, broker.url, steps=steps, items=items or 0)
        except BenchmarkError as error:
            raise click.ClickException(str(error)) from None
    console.print(table_of(report))
    done = report.samples[-1].steps
    console.print(f"{done:,} steps in {report.seconds:.0f} s, {done / report.seconds:.0f} a second.")
    for name, slope in report.slopes().items():
        console.print(f"{name}: {slope:+.1f} bytes a step after the warm-up")
    for name, more in report.growth().items():
        console.print(f"{name}: {more:+d} at least in the second half")
    flat = report.flat()
    console.print("Flat." if flat else f"Not flat: {FLAT_BYTES:g} bytes a step are allowed.")
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
