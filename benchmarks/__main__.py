"""``python -m benchmarks``: compare Byrd with plain Celery, with other engines, and with bare SQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import CASES, FULL, GROUPS, GROWTH_CASES, QUICK, Case
from benchmarks.engines import ENGINES
from benchmarks.environments import python_of
from benchmarks.errors import UnavailableError
from benchmarks.report import as_json, show
from benchmarks.run import Block, Comparison, blocks
from benchmarks.servers import Servers, servers
from byrd.errors import ByrdError

#: Of what is printed into a file, in characters.
_WIDTH = 120


def _among(names: Sequence[str]) -> Callable[[click.Context, click.Parameter, str | None], list[str] | None]:
    def parse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
        wanted = [name.strip() for name in value.split(",")] if value else None
        for name in wanted or []:
            if name not in names:
                raise click.BadParameter(f"there is no {name!r}; there are {', '.join(names)}")
        return wanted

    return parse


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--cases",
    callback=_among([*GROUPS, *(case.name for case in CASES)]),
    help=f"Which to run, with commas: {', '.join(GROUPS)}, or single cases.",
)
@click.option("--engines", callback=_among(list(ENGINES)), help=f"Which to compare, with commas: {', '.join(ENGINES)}.")
@click.option("--rounds", type=click.IntRange(1), help=f"How often.  [default: {FULL.rounds}; quick {QUICK.rounds}]")
@click.option("--quick", is_flag=True, help="The cases of the figures only, less of each: about 5 minutes.")
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write all figures there."
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Draw plots into that folder, as SVG.")
@click.option(
    "--absurd-sql",
    envvar="BENCHMARKS_ABSURD_SQL",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="absurd's schema, absurd.sql, without which absurd is left out.  [env: BENCHMARKS_ABSURD_SQL]",
)
def main(
    *,
    cases: list[str] | None,
    engines: list[str] | None,
    rounds: int | None,
    quick: bool,
    target: Path | None,
    plots: Path | None,
    absurd_sql: str | None,
) -> None:
    """Compare Byrd with plain Celery, with other engines, and with bare SQL: the same work for all, in one run."""
    scale = QUICK if quick else FULL
    rounds = rounds or scale.rounds
    # Byrd's own variables would send its client elsewhere than to the servers of this run.
    for name in ("BYRD_BROKER_URL", "BYRD_DATABASE_URL"):
        os.environ.pop(name, None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and servers are ended
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(_WIDTH, console.width))
    default = [engine.name for engine in ENGINES.values() if engine.quick or not quick]
    compared = [engine for name, engine in ENGINES.items() if name in (engines or default)]
    planned = blocks(compared, _cases(cases, quick=quick), _growth(cases, quick=quick), rounds=rounds)
    options = {"absurd": {"sql": absurd_sql}} if absurd_sql else {}
    try:
        with tempfile.TemporaryDirectory(prefix="byrd-benchmarks-") as folder, servers() as running:
            comparison = Comparison(running, scale, Path(folder), options=options)
            for _ in _progress(console, comparison, planned):
                if target is not None:  # each time, so that a run which is broken off has not been for nothing
                    target.write_text(_figures(running, comparison, rounds))
    except ByrdError as error:
        raise click.ClickException(str(error)) from None
    show(console, running, comparison.outcome, rounds=rounds)
    if target is not None:
        console.print(f"All figures: {target}", style="dim")
    if plots is not None:
        _draw(console, _figures(running, comparison, rounds), plots)
    sys.exit(1 if comparison.outcome.troubles else 0)


def _figures(running: Servers, comparison: Comparison, rounds: int) -> str:
    return json.dumps(as_json(running, comparison.outcome, rounds=rounds), indent=1) + "\n"


def _progress(console: Console, comparison: Comparison, planned: Sequence[Block]) -> Iterator[None]:
    """Run the blocks, and stop after each; tell a terminal where they are, and a file what has begun."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=len(planned))
        for block in planned:
            if not console.is_terminal:
                console.print(f"{datetime.now(UTC):%H:%M:%S} {block.label}", style="dim", highlight=False)
            comparison.run(block, lambda text: bar.update(task, description=text))
            bar.advance(task)
            yield


def _draw(console: Console, figures: str, folder: Path) -> None:
    """Draw plots, in an environment of their own."""
    try:
        python = python_of("plots", (3, 11))
    except UnavailableError as error:
        console.print(f"No plots: matplotlib {error}", style="yellow", highlight=False)
        return
    with tempfile.TemporaryDirectory(prefix="byrd-benchmarks-") as temporary:
        source = Path(temporary) / "figures.json"
        source.write_text(figures)
        script = Path(__file__).with_name("plots.py")
        drawn = subprocess.run(
            [python, str(script), str(source), str(folder)], capture_output=True, text=True, check=False
        )
    if drawn.returncode:
        raise click.ClickException(f"the plots cannot be drawn: {drawn.stderr.strip()[-2000:]}")
    console.print(
        f"Plots: {', '.join(drawn.stdout.split()) or 'none, as nothing was measured at two points'}", style="dim"
    )


def _cases(names: Sequence[str] | None, *, quick: bool) -> list[Case]:
    if names is None:
        return [case for case in CASES if case.quick or not quick]
    growing = GROWTH_CASES if {"processes", "tables"} & set(names) else ()
    return [case for case in CASES if case.group in names or case.name in names or case.name in growing]


def _growth(names: Sequence[str] | None, *, quick: bool) -> list[str]:
    growth = [] if quick else ["processes", "tables"]
    return growth if names is None else [name for name in ("processes", "tables") if name in names]


if __name__ == "__main__":
    main()
