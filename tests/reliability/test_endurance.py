"""A worker's memory and connections stay flat: in thousands of steps here, in 50,000 in ``benchmarks.endurance``."""

from __future__ import annotations

import os

import pytest
from rich.console import Console

from benchmarks.endurance import Report, endure, table_of

STEPS = int(os.environ.get("BYRD_ENDURANCE_STEPS", "14000"))
LEAKING_STEPS = 2500
#: Allowances of the allocator weigh more in so short a run: a leak has to be larger to be told from them.
BYTES_PER_STEP = 500.0


def told(report: Report) -> str:
    console = Console(width=120, record=True, quiet=True)
    console.print(table_of(report))
    return f"{console.export_text()}\n{report.slopes()}\n{report.growth()}"


@pytest.mark.timeout(600)
def test_memory_and_connections_of_a_worker_stay_flat(database_url: str, broker_url: str) -> None:
    report = endure(database_url, broker_url, steps=STEPS, look_seconds=0.5)
    assert report.flat(bytes_per_step=BYTES_PER_STEP), told(report)


@pytest.mark.timeout(600)
def test_the_items_of_an_each_do_not_wait_in_the_tables(database_url: str, broker_url: str) -> None:
    """No more than a page and twice its limit, whatever their number: a million by ``--items 1000000``."""
    report = endure(database_url, broker_url, items=4000, look_seconds=0.1)
    assert report.samples[-1].steps == 4000
    assert max(sample.open for sample in report.samples) <= 1 + 500 + 2 * 64, told(report)


@pytest.mark.timeout(600)
def test_a_leak_of_a_kilobyte_per_step_is_noticed(database_url: str, broker_url: str) -> None:
    report = endure(
        database_url, broker_url, steps=LEAKING_STEPS, look_seconds=0.5, environment={"ENDURANCE_LEAK": "1024"}
    )
    slopes = report.slopes()
    assert min(slopes["child 1"], slopes["child 2"]) > BYTES_PER_STEP, told(report)
