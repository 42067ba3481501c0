"""The comparison runs to its end, leaves nothing behind and writes what its README promises; speed is not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parents[2]
_ENGINES = {"celery-redis", "celery-postgres", "byrd"}


def _run(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _workers() -> set[int]:
    return {p.pid for p in psutil.process_iter(["cmdline"]) if "benchmarks.worker" in (p.info["cmdline"] or [])}


def test_a_short_comparison_writes_figures_for_every_engine(tmp_path: Path) -> None:
    before = _workers()
    target = tmp_path / "figures.json"
    done = _run(tmp_path, "--rounds", "1", "--chains", "3", "--chords", "1", "--json", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "chains of 10" in done.stdout
    assert "chords of 100" in done.stdout
    assert _workers() <= before

    figures = json.loads(target.read_text())
    assert figures["settings"] == {
        "rounds": 1,
        "chain_length": 10,
        "chord_width": 100,
        "workers": 1,
        "pool": "prefork",
        "concurrency": 2,
    }
    assert figures["machine"]["commit_ms"] > 0
    assert {"byrd", "celery", "python", "postgres", "redis_server"} <= figures["versions"].keys()
    for workload, canvases, steps in (("chains", 3, 30), ("chords", 1, 101)):
        found = {r["engine"]: r for r in figures["results"] if r["workload"] == workload}
        assert found.keys() == _ENGINES
        for result in found.values():
            _check(result, canvases, steps)
        assert found["celery-redis"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def _check(result: dict[str, Any], canvases: int, steps: int) -> None:
    assert (result["canvases"], result["steps"]) == (canvases, steps)
    (turn,) = result["turns"]
    assert 0 < turn["submit_seconds"] <= turn["seconds"]
    assert turn["cpu_seconds"] > 0
    for spread in (result["steps_per_second"], result["cpu_ms_per_step"], result["ratio"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_an_unknown_engine_is_refused_by_name(tmp_path: Path) -> None:
    done = _run(tmp_path, "--engines", "byrd,airflow")
    assert done.returncode == 2
    assert "airflow" in done.stderr
    assert "celery-redis" in done.stderr
