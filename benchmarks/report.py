"""What a comparison prints, and the JSON that it writes."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import CONCURRENCY, POOL, Cluster
from benchmarks.engines import CHAIN_LENGTH, CHORD_WIDTH, EngineName
from benchmarks.measure import Result, Spread

_TITLES = {
    EngineName.CELERY_REDIS: "Celery, Redis results",
    EngineName.CELERY_POSTGRES: "Celery, Postgres results",
    EngineName.BYRD: "Byrd",
}


def as_json(cluster: Cluster, results: Sequence[Result], *, rounds: int) -> dict[str, Any]:
    """Return everything that was measured, and on what."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            **{name: version(name) for name in ("byrd", "celery", "kombu", "redis", "psycopg2-binary", "sqlalchemy")},
            "python": platform.python_version(),
            "postgres": cluster.postgres_version,
            "redis_server": cluster.redis_version,
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load": cluster.load,
            "commit_ms": round(cluster.commit_ms, 3),
        },
        "settings": {
            "rounds": rounds,
            "chain_length": CHAIN_LENGTH,
            "chord_width": CHORD_WIDTH,
            "workers": 1,
            "pool": POOL,
            "concurrency": CONCURRENCY,
        },
        "results": [_result_json(result) for result in results],
    }


def show(console: Console, cluster: Cluster, results: Sequence[Result], *, rounds: int) -> None:
    """Print the tables."""
    for workload in dict.fromkeys(result.workload for result in results):
        found = [result for result in results if result.workload is workload]
        table = Table(title=f"{found[0].canvases} {workload.label}, {rounds} rounds", title_justify="left")
        table.add_column("engine", no_wrap=True)
        table.add_column("steps/s", justify="right")
        table.add_column("min–max", justify="right")
        table.add_column("ratio", justify="right")
        table.add_column("min–max", justify="right")
        table.add_column("CPU ms/step", justify="right")
        for result in found:
            table.add_row(
                _TITLES[result.engine],
                *_cells(result.steps_per_second, "{:,.0f}"),
                *_cells(result.ratio, "{:.2f}"),
                f"{result.cpu_ms_per_step.median:.2f}",
            )
        console.print(table)
    console.print(
        f"One worker each, {POOL} -c {CONCURRENCY}; {os.cpu_count()} CPUs; Postgres {cluster.postgres_version} with "
        f"fsync, where a commit takes {cluster.commit_ms:.2f} ms. Compare ratios, not steps/s, with other machines.",
        style="dim",
    )
    if cluster.load > 0.5:
        console.print(
            f"This machine was busy before the first turn (load {cluster.load:.1f}): steps/s and ratios are loose, "
            "CPU ms/step less so.",
            style="yellow",
        )


def _cells(spread: Spread | None, form: str) -> tuple[str, str]:
    if spread is None:
        return "–", "–"
    return form.format(spread.median), f"{form.format(spread.min)}–{form.format(spread.max)}"


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "workload": result.workload.value,
        "engine": result.engine.value,
        "canvases": result.canvases,
        "steps": result.canvases * result.workload.steps,
        "turns": [{name: round(value, 4) for name, value in asdict(turn).items()} for turn in result.turns],
        "steps_per_second": _spread_json(result.steps_per_second, 1),
        "cpu_ms_per_step": _spread_json(result.cpu_ms_per_step, 3),
        "ratio": _spread_json(result.ratio, 3) if result.ratio is not None else None,
    }


def _spread_json(spread: Spread, digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in asdict(spread).items()}
