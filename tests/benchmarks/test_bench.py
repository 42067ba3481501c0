"""The comparison runs to its end, leaves nothing behind and writes what its README promises; speed is not judged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.figures import FIGURES
from benchmarks.peers.protocol import Shape
from benchmarks.samples import Sample, Selector, Spread, percentile, ratio

_ROOT = Path(__file__).resolve().parents[2]
_ENGINES = ("celery-redis", "byrd")


def _run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def _left_behind(tmp_path: Path) -> list[psutil.Process]:
    """Return the processes of the comparison that had this folder, of all that may run on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(tmp_path):
                found.append(process)
    return found


def test_a_short_comparison_writes_figures_for_every_engine(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    options = ("--quick", "--rounds", "1", "--engines", ",".join(_ENGINES), "--cases", "chain-10,low-1,workers")
    done = _run(tmp_path, *options, "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "chains of 10" in done.stdout
    assert "Figures to reach" in done.stdout
    assert _left_behind(tmp_path) == []

    figures = json.loads(target.read_text())
    assert figures["settings"] == {"rounds": 1, "processes": 2}
    assert figures["machine"]["commit_ms"] > 0
    assert {"byrd", "celery", "python", "postgres", "valkey"} <= figures["versions"].keys()
    assert figures["engines"].keys() == set(_ENGINES)
    assert (figures["unavailable"], figures["troubles"]) == ({}, [])
    found = {(sample["engine"], sample["case"]): sample for sample in figures["samples"]}
    assert found.keys() == {(e, c) for e in _ENGINES for c in ("chain-10", "low-1", "cold-start", "resident")}
    for engine in _ENGINES:
        _check(found[engine, "chain-10"]["metrics"])
        low = found[engine, "low-1"]
        assert 0 < low["metrics"]["p50_ms"] <= low["metrics"]["p99_ms"] <= max(low["latencies_ms"])
        assert found[engine, "cold-start"]["metrics"]["seconds"] > 0
        assert found[engine, "resident"]["metrics"]["child_mb"] > 1
    [figure] = [f for f in figures["figures"] if f["against"] == "Celery, Redis results" and "chains" in f["case"]]
    assert figure["target"] == 4
    assert figure["reached"] == (figure["measured"]["median"] >= 4)


def _check(metrics: dict[str, Any]) -> None:
    assert metrics["per_second"] == pytest.approx(1000 / metrics["ms_per_step"])
    assert 0 < metrics["submit_seconds"] <= metrics["seconds"]
    assert metrics["cpu_children_ms"] > 0
    assert metrics["cpu_main_ms"] > 0


def test_an_unknown_engine_is_refused_by_name(tmp_path: Path) -> None:
    done = _run(tmp_path, "--engines", "byrd,airflow")
    assert done.returncode == 2
    assert "airflow" in done.stderr
    assert "celery-redis" in done.stderr


def test_ratios_pair_the_measurements_of_one_round() -> None:
    samples = [
        Sample(engine, "chain-10", number, {"per_second": speed})
        for number, (fast, slow) in enumerate([(400.0, 100.0), (90.0, 30.0), (1000.0, 200.0)])
        for engine, speed in (("byrd", fast), ("celery-redis", slow))
    ]
    samples.append(Sample("byrd", "chain-10", 3, {"per_second": 1.0}))  # its pair is missing
    samples.append(Sample("byrd", "chain-10", 0, {"per_second": 1.0}, processes=8))
    found = ratio(samples, Selector("byrd", "chain-10"), Selector("celery-redis", "chain-10"))
    assert found == Spread(4.0, 3.0, 5.0)
    assert FIGURES[0].measured(samples) == found
    assert FIGURES[0].reached(found)
    assert FIGURES[1].measured(samples) is None


def test_a_mix_is_counted_and_valued_canvas_by_canvas() -> None:
    mix = Shape("mix", 0, 5.0)
    assert mix.steps(10) == 35
    assert {mix.of(n).kind for n in range(10)} == {"chain", "chord"}
    assert [mix.value(n) for n in (4, 8, 9)] == [4, 8, 90]
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([1.0], 99) == 1.0
