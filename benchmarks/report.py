"""What a comparison prints, and the JSON that it writes."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, Case, Kind
from benchmarks.engines import CELERY, ENGINES
from benchmarks.figures import FIGURES
from benchmarks.samples import PROCESSES, Outcome, Sample, Selector, Spread, percentile, ratio
from benchmarks.servers import Servers

#: Milliseconds of CPU time a step, in a table: all of Python's, the part of it in pool processes, Postgres'.
_CPU = {
    "CPU ms: Python": ("client", "main", "children"),
    "pool processes": ("children",),
    "Postgres": ("postgres",),
    "Valkey": ("valkey",),
}


@dataclass(frozen=True, slots=True)
class Column:
    """A metric in a table; the first of a case is the one whose ratio and spread are shown."""

    title: str
    metric: str
    form: str = "{:,.0f}"


_COLUMNS: dict[Kind, tuple[Column, ...]] = {
    Kind.SUBMIT: (Column("runs/s", "per_second"),),
    Kind.DRAIN: (Column("runs/s", "per_second"),),
    Kind.SATURATE: (Column("steps/s", "per_second"),),
    Kind.LATENCY: (Column("p50 ms", "p50_ms", "{:,.1f}"),),
    Kind.LOAD: (Column("p50 ms", "p50_ms", "{:,.1f}"),),
    Kind.COLD_START: (Column("seconds", "seconds", "{:.2f}"),),
    Kind.RESIDENT: (Column("MB in all", "total_mb"), Column("MB a process", "child_mb")),
    Kind.MEMORY: (Column("MB after 50,000 steps", "later_mb"), Column("after 5,000", "early_mb")),
    Kind.CHECKPOINTS: (
        Column("s, each 100", "checkpoints_seconds", "{:.3f}"),
        Column("s, one at the end", "one_seconds", "{:.3f}"),
        Column("s, bare loop", "none_seconds", "{:.3f}"),
    ),
}


def show(console: Console, servers: Servers, outcome: Outcome, *, rounds: int) -> None:
    """Print the tables of cases, what was left out, and last the figures to reach."""
    for case in CASES:
        _show_case(console, case, outcome.samples)
    _show_growth(console, outcome.samples)
    for name, why in outcome.unavailable.items():
        console.print(f"{ENGINES[name].title} is not here: {why}", style="yellow", highlight=False)
    for trouble in outcome.troubles:
        console.print(f"{ENGINES[trouble.engine].title} failed at {trouble.case}: {trouble.message}", style="red")
    _show_figures(console, outcome.samples)
    console.print(
        f"{rounds} rounds; {PROCESSES} processes each unless the row says otherwise; {os.cpu_count()} CPUs; Postgres "
        f"{servers.postgres_version} with fsync, where a commit takes {servers.commit_ms:.2f} ms. Compare ratios, not "
        "rates, with other machines.",
        style="dim", highlight=False,
    )  # fmt: skip
    if servers.load > 0.5:
        console.print(
            f"This machine was busy before the first turn (load {servers.load:.1f}): rates and ratios are loose, "
            "CPU times less so.",
            style="yellow", highlight=False,
        )  # fmt: skip


def _show_case(console: Console, case: Case, samples: Sequence[Sample]) -> None:
    columns = _COLUMNS[case.kind]
    engines = [name for name in ENGINES if Selector(name, case.name, columns[0].metric).of(samples)]
    if not engines:
        return
    table = Table(title=case.title, title_justify="left", title_style="bold", box=None, header_style="dim")
    table.add_column("engine", no_wrap=True, min_width=26)
    for column in (*columns[:1], Column("min–max", ""), Column("ratio", ""), Column("min–max", ""), *columns[1:]):
        table.add_column(column.title, justify="right")
    latency = case.kind in (Kind.LATENCY, Kind.LOAD)
    rated = case.kind in (Kind.SUBMIT, Kind.DRAIN, Kind.SATURATE)
    for title in ("p99 ms",) if latency else _CPU if rated else ():
        table.add_column(title, justify="right")
    for name in engines:
        row = [*_cells(name, case, columns[0], samples)]
        row += [_median(name, case, column.metric, column.form, samples) for column in columns[1:]]
        if latency:
            row.append(f"{percentile(_pooled(name, case, samples), 99):,.1f}")
        if rated:
            row += [_cpu(name, case, parts, samples) for parts in _CPU.values()]
        table.add_row(ENGINES[name].title, *row)
    console.print(table, "")


def _cells(name: str, case: Case, column: Column, samples: Sequence[Sample]) -> list[str]:
    selector = Selector(name, case.name, column.metric)
    found = Spread.of(selector.of(samples).values())
    against = ratio(samples, selector, Selector(CELERY, case.name, column.metric))
    return [*_spread(found, column.form), *_spread(against, "{:.2f}")]


def _median(name: str, case: Case, metric: str, form: str, samples: Sequence[Sample]) -> str:
    return _spread(Spread.of(Selector(name, case.name, metric).of(samples).values()), form)[0]


def _cpu(name: str, case: Case, parts: Sequence[str], samples: Sequence[Sample]) -> str:
    found = [Selector(name, case.name, f"cpu_{part}_ms").of(samples) for part in parts]
    totals = Spread.of(sum(part[number] for part in found) for number in found[0])
    return _spread(totals, "{:.2f}")[0]


def _pooled(name: str, case: Case, samples: Sequence[Sample]) -> list[float]:
    return [
        taken for sample in samples if (sample.engine, sample.case) == (name, case.name)
        for taken in sample.latencies_ms
    ]  # fmt: skip


def _spread(found: Spread | None, form: str) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    return form.format(found.median), f"{form.format(found.min)}–{form.format(found.max)}"


def _show_growth(console: Console, samples: Sequence[Sample]) -> None:
    for field, title, usual in (("processes", "processes", PROCESSES), ("finished", "finished runs in the tables", 0)):
        grown = {
            (sample.case, sample.engine) for sample in samples if getattr(sample, field) != usual
        }  # fmt: skip
        values = sorted({getattr(sample, field) for sample in samples if (sample.case, sample.engine) in grown})
        for case in (case for case in CASES if any(case.name == name for name, _ in grown)):
            table = Table(title=f"{case.title}, by {title}: per second", title_justify="left", title_style="bold",
                          box=None, header_style="dim")  # fmt: skip
            table.add_column("engine", no_wrap=True, min_width=26)
            for value in values:
                table.add_column(f"{value:,}", justify="right")
            for name in (name for name in ENGINES if (case.name, name) in grown):
                selectors = [Selector(name, case.name, **{field: value}) for value in values]
                cells = [_spread(Spread.of(s.of(samples).values()), "{:,.0f}")[0] for s in selectors]
                table.add_row(ENGINES[name].title, *cells)
            console.print(table, "")


def _show_figures(console: Console, samples: Sequence[Sample]) -> None:
    table = Table(title="Figures to reach", title_justify="left", title_style="bold", box=None, header_style="dim")
    for name in ("case", "against"):
        table.add_column(name, overflow="fold")
    for name in ("target", "measured", "min–max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for figure in FIGURES:
        found = figure.measured(samples)
        verdict = "not measured" if found is None else "reached" if figure.reached(found) else "NOT reached"
        sign = "≤" if figure.at_most else "≥"
        style = "dim" if found is None else None
        table.add_row(
            figure.label, figure.against, f"{sign} {figure.bound:g}×", *_spread(found, "{:.2f}"), verdict, style=style
        )
    console.print(table, "")


def as_json(servers: Servers, outcome: Outcome, *, rounds: int) -> dict[str, Any]:
    """Return everything that was measured, and on what."""
    names = ("byrd", "celery", "kombu", "redis", "psycopg2-binary", "sqlalchemy")
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            **{name: version(name) for name in names},
            "python": platform.python_version(),
            "postgres": servers.postgres_version,
            "valkey": servers.valkey_version,
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load": servers.load,
            "commit_ms": servers.commit_ms,
        },
        "settings": {"rounds": rounds, "processes": PROCESSES},
        "engines": {name: {"title": ENGINES[name].title, "version": found} for name, found in outcome.versions.items()},
        "cases": {case.name: case.title for case in CASES},
        "unavailable": outcome.unavailable,
        "troubles": [asdict(trouble) for trouble in outcome.troubles],
        "samples": [asdict(sample) for sample in outcome.samples],
        "figures": [
            {
                "case": figure.label,
                "against": figure.against,
                "target": figure.bound,
                "at_most": figure.at_most,
                "measured": asdict(found) if (found := figure.measured(outcome.samples)) else None,
                "reached": figure.reached(found) if found else None,
            }
            for figure in FIGURES
        ],
    }
