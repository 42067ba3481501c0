"""``python -m benchmarks``: compare Byrd with plain Celery."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cluster import BenchmarkError, cluster
from benchmarks.engines import EngineName, Workload
from benchmarks.measure import measure, turns_of
from benchmarks.report import as_json, show
from byrd.errors import ByrdError

_ALL = ",".join(EngineName)


def _engines(_context: click.Context, _parameter: click.Parameter, value: str) -> list[EngineName]:
    try:
        wanted = {EngineName(name.strip()) for name in value.split(",")}
    except ValueError as error:
        raise click.BadParameter(f"{error}; the engines are {_ALL}") from None
    return [name for name in EngineName if name in wanted]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each engine is measured."
)
@click.option(
    "--chains", type=click.IntRange(0), default=40, show_default=True, help="Chains per turn; 0 leaves them out."
)
@click.option(
    "--chords", type=click.IntRange(0), default=4, show_default=True, help="Chords per turn; 0 leaves them out."
)
@click.option("--engines", callback=_engines, default=_ALL, show_default=True, help="Which to compare, with commas.")
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write all figures there."
)
def main(rounds: int, chains: int, chords: int, engines: list[EngineName], target: Path | None) -> None:
    """Compare Byrd with plain Celery on Redis and on Postgres results: no-op chains and chords, in one run."""
    counts = {w: n for w, n in ((Workload.CHAINS, chains), (Workload.CHORDS, chords)) if n}
    if not counts:
        raise click.UsageError("--chains 0 --chords 0 leaves nothing to measure")
    # Byrd's own variables would send its client elsewhere than to the servers of this run.
    for name in ("BYRD_BROKER_URL", "BYRD_DATABASE_URL"):
        os.environ.pop(name, None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and servers are ended
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with cluster(engines) as running, Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("measuring", total=turns_of(len(engines), len(counts), rounds))
            results = measure(running.contestants, counts, rounds=rounds, progress=lambda: bar.advance(task))
    except (BenchmarkError, ByrdError) as error:
        raise click.ClickException(str(error)) from None
    show(console, running, results, rounds=rounds)
    if target is not None:
        target.write_text(json.dumps(as_json(running, results, rounds=rounds), indent=2) + "\n")
        console.print(f"All figures: {target}", style="dim")


if __name__ == "__main__":
    main()
