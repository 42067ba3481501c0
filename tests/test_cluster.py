"""The test harness itself: real workers that start, work, die and come back."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster import ROOT, Cluster, wait_until

APP = "tests.apps.basic"


def test_a_worker_runs_canvases_and_comes_back_after_a_kill(cluster: Cluster, tmp_path: Path) -> None:
    basic = cluster.app(APP)
    worker = cluster.worker(APP)
    assert basic.engine.submit(basic.add.s(1, 2) | basic.add.s(3)).get(timeout=30) == 6
    pool = worker.pids()
    assert len(pool) == 2

    go = tmp_path / "go"
    run = basic.engine.submit(basic.wait_for_file.s(str(go), "done"))
    wait_until(lambda: [step for step in run.steps() if step.status == "running"], what="running step")
    worker.kill()
    assert not worker.running
    wait_until(lambda: not any(map(psutil.pid_exists, pool)), what="end of the pool")
    go.touch()
    worker.restart()
    assert run.get(timeout=60) == "done"
    assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_worker_may_have_another_pool(cluster: Cluster, pool: str) -> None:
    basic = cluster.app(APP)
    cluster.worker(APP, pool=pool, loglevel="WARNING")
    assert basic.engine.submit(basic.add.s(1, 2)).get(timeout=30) == 3


def test_workers_end_with_the_tests_even_if_those_are_killed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
import signal
import subprocess
import sys
from pathlib import Path
from tests.cluster import Worker

worker = Worker("orphan", ["sleep", "600"], os.environ, Path(sys.argv[1]))
worker.start()
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(int(killed.stdout)), what="end of the worker")
