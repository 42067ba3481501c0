"""How soon a step runs again after its worker failed: ``python -m benchmarks.recovery_workers``.

Embedded servers, two workers (prefork, 2 processes each) with Byrd's default settings.  In each trial a step runs on
one of them when the fault strikes; measured is the time from the signal to the step's next start.
"""

from __future__ import annotations

import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.recovery_servers import judge, start_worker, wait_until
from byrd import embedded, store
from byrd.errors import ByrdError

Strike = Callable[[psutil.Process, int], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """``task``: the step that runs.  ``strike(main, child)``: what happens to its worker, or to its process."""

    task: str
    strike: Strike
    to_reach: float
    ends_worker: bool = True


def _kill_all(main: psutil.Process, _child: int) -> None:
    for process in [main, *main.children()]:
        process.kill()


FAULTS: dict[str, Fault] = {
    "pool child killed": Fault("hold", lambda _main, child: os.kill(child, signal.SIGKILL), 1.0, ends_worker=False),
    "worker SIGTERM": Fault("hold_in_steps", lambda main, _child: main.terminate(), 2.0),
    "worker SIGKILL": Fault("hold", _kill_all, 10.0),
}


def measure(faults: Sequence[str], *, trials: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    """Have each fault strike a worker again and again; one that died is replaced."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="byrd-recovery-")))
        servers = (stack.enter_context(embedded.postgres()), stack.enter_context(embedded.valkey(persistence=False)))
        store.migrate(servers[0].url)
        os.environ.update(BYRD_DATABASE_URL=servers[0].url, BYRD_BROKER_URL=servers[1].url)
        from benchmarks import recovery_app

        stack.callback(recovery_app.app.close)
        stack.callback(recovery_app.engine.close)
        workers = [stack.enter_context(start_worker(folder / f"worker{n}.log", f"w{n}@bench")) for n in (1, 2)]
        found: dict[str, list[float]] = {fault: [] for fault in faults}
        for fault in faults:
            for number in range(trials):
                progress(f"{fault}: {number + 1} of {trials}")
                name = f"{fault}-{number}".replace(" ", "-")
                found[fault].append(_trial(recovery_app, FAULTS[fault], folder / name))
                if FAULTS[fault].ends_worker:  # one that stops warmly takes a moment longer than its step
                    wait_until(lambda: any(worker.poll() is not None for worker in workers))
                for n, worker in enumerate(workers):
                    if worker.poll() is not None:
                        log = folder / f"{name}-{n}.log"
                        workers[n] = stack.enter_context(start_worker(log, f"{name}-{n}@bench"))
        return found


def _trial(load: Any, fault: Fault, go: Path) -> float:
    engine = load.engine
    run = engine.submit(getattr(load, fault.task).s(str(go)) | load.add_one.s())
    [step, *_] = wait_until(lambda: [step for step in run.steps() if step.status == "running"])
    [worker] = [worker for worker in engine.workers() if worker.id == step.worker_id]
    main = psutil.Process(worker.pid)
    struck = time.time()
    fault.strike(main, step.pid)
    again = wait_until(lambda: _started(run, step.attempt))
    go.touch()
    if run.get(timeout=60) != 1:
        raise BenchmarkError("the run gave another value than without a fault")
    return float(again) - struck


def _started(run: Any, before: int) -> float | None:
    step = run.steps()[0]
    if step.attempt > before and step.started_at is not None:
        return float(step.started_at.timestamp())
    return None


def show(console: Console, results: Mapping[str, Sequence[float]]) -> None:
    """Print the table."""
    table = Table(title="From the fault to the next start of the step, in seconds", title_justify="left")
    table.add_column("fault", no_wrap=True)
    for name in ("to reach", "median", "max"):
        table.add_column(name, justify="right")
    for fault, seconds in results.items():
        figures = (f"{FAULTS[fault].to_reach:g}", f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}")
        table.add_row(fault, *figures)
    console.print(table)
    trials = len(next(iter(results.values())))
    console.print(f"{trials} trials each; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs.", style="dim")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--trials", type=click.IntRange(1), default=5, show_default=True, help="How often each fault strikes.")
@click.option("--fault", "only", type=click.Choice(list(FAULTS)), multiple=True, help="Only this one; may be repeated.")
@click.option(
    "--tolerate", type=click.FloatRange(1), default=1.0, show_default=True, help="Times the figure, on a busy machine."
)
def main(trials: int, only: tuple[str, ...], tolerate: float) -> None:
    """Measure how soon a step runs again after its worker, or its pool process, failed; exit 1 if that is too late."""
    logging.getLogger("byrd").setLevel(logging.ERROR)
    console = Console()
    try:
        with console.status("starting") as status:
            results = measure(only or tuple(FAULTS), trials=trials, progress=status.update)
    except (BenchmarkError, ByrdError) as error:
        raise click.ClickException(str(error)) from None
    show(console, results)
    judge({fault: (FAULTS[fault].to_reach, seconds) for fault, seconds in results.items()}, tolerate)


if __name__ == "__main__":
    main()
