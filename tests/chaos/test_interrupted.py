"""Ctrl-C in the middle of `byrd chaos`: what was done so far is told, and nothing is left stopped or frozen."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from byrd.chaos.tasks import QUEUE
from byrd.embedded import EmbeddedValkey
from tests.chaos.test_chaos import APP, BYRD, _has, assert_clean
from tests.cluster import ROOT, Cluster, ClusterFactory, wait_until
from tests.invariants import check_database


class Chaos:
    """A `byrd chaos --json` that runs, and whose terminal this is: Ctrl-C reaches its whole process group."""

    def __init__(self, folder: Path, *options: str, env: dict[str, str]) -> None:
        self.report, self._told, self._out = folder / "report.json", folder / "told", folder / "out"
        command = [*BYRD, "chaos", "--json", "--report", str(self.report), *options]
        with self._told.open("wb") as told, self._out.open("wb") as out:
            self._popen = subprocess.Popen(
                command, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=out,
                stderr=told, start_new_session=True,
            )  # fmt: skip

    @property
    def told(self) -> str:
        """What it has told so far."""
        return self._told.read_text()

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Press Ctrl-C."""
        os.killpg(self._popen.pid, number)

    def wait_told(self, text: str) -> None:
        """Wait until it tells something."""
        wait_until(lambda: text in self.told or self._popen.poll() is not None, timeout=60, what=text)
        assert text in self.told

    def end(self, timeout: float = 60) -> int:
        """Wait until it has ended; return its status."""
        return self._popen.wait(timeout)

    def printed(self) -> dict[str, Any]:
        """Return the report that it has printed, and has written to the file too."""
        found: dict[str, Any] = json.loads(self._out.read_text())
        assert found == json.loads(self.report.read_text())
        return found

    def kill(self) -> None:
        """End what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


@contextmanager
def running(folder: Path, *options: str, env: dict[str, str]) -> Iterator[Chaos]:
    chaos = Chaos(folder, "--every", "0.1s", "--for", "10m", "--open", "6", *options, env=env)
    try:
        yield chaos
    finally:
        chaos.kill()


def is_frozen(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def check_interrupted(chaos: Chaos, cluster: Cluster) -> dict[str, Any]:
    """It ends soon, and well, with an audit of what was done by then."""
    status, report = chaos.end(), chaos.printed()
    assert_clean(status, report, chaos.told)
    assert report["interrupted"] is True
    assert report["seconds"] < 60
    assert "Asked to stop" in chaos.told
    check_database(cluster.database_url)
    return report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_a_worker_is_frozen(cluster: Cluster, tmp_path: Path, number: signal.Signals) -> None:
    worker = cluster.worker(APP, queues=[QUEUE], options=["-I", "byrd.chaos.load"], env={"TEST_LEASE_SECONDS": "30"})
    pids = [worker.pid, *worker.pids()]
    options = ["--kill-worker", worker.hostname, "--pause-workers", "--seed", "1"]  # which freezes it first
    with running(tmp_path, "-A", APP, *options, env={**cluster.env, "TEST_LEASE_SECONDS": "30"}) as chaos:
        wait_until(lambda: all(is_frozen(pid) for pid in pids), timeout=60, what=lambda: f"frozen: {chaos.told}")
        chaos.interrupt(number)
        report = check_interrupted(chaos, cluster)
    assert report["faults"] == {"worker_frozen": 1}
    assert [worker.pid, *worker.pids()] == pids
    assert not any(is_frozen(pid) for pid in pids)


@pytest.mark.parametrize("moment", ["while it is away", "while it is started"])
def test_while_redis_is_away(
    cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey, tmp_path: Path, moment: str
) -> None:
    """It is started again; and the command that does so, which Ctrl-C reaches as well, is not cut off by it."""
    cluster = cluster_on(database_url=database_url, broker_url=own_broker.url)
    cluster.worker(APP, queues=[QUEUE], options=["-I", "byrd.chaos.load"])
    start, starting = tmp_path / "start.sh", tmp_path / "starting"
    start.write_text(f"touch {starting}; sleep 1; kill -CONT {own_broker.pid}")
    long = ["--outage", "300s" if moment == "while it is away" else "0.1s"]
    options = ["--stop-redis", f"kill -STOP {own_broker.pid}", "--start-redis", f"sh {start}", *long]
    with running(tmp_path, "-A", APP, *options, env=cluster.env) as chaos:
        if moment == "while it is away":
            wait_until(lambda: is_frozen(own_broker.pid), timeout=60, what=lambda: f"an outage: {chaos.told}")
        else:
            wait_until(starting.exists, timeout=60, what=lambda: f"a start: {chaos.told}")
        chaos.interrupt()
        report = check_interrupted(chaos, cluster)
    assert report["faults"] == {"redis_restarted": 1}
    assert not is_frozen(own_broker.pid)


@pytest.mark.parametrize("times", [1, 2])
def test_with_servers_and_workers_of_its_own(tmp_path: Path, times: int) -> None:
    """The first time they are audited, and then ended; the second time they are ended at once."""
    mark = f"CHAOS_TEST={secrets.token_hex(8)}"
    env = {**os.environ, **dict([mark.split("=")])}
    with running(tmp_path, "--embedded", "--outage", "1s", env=env) as chaos:
        chaos.wait_told("SIG")  # a worker was hit
        chaos.interrupt()
        chaos.wait_told("Asked to stop")
        if times == 2:
            chaos.interrupt()
        status = chaos.end()
        if times == 1:
            assert_clean(status, chaos.printed(), chaos.told)
            assert chaos.printed()["interrupted"] is True
        else:
            assert status == 1
            assert not chaos.report.exists()
    left = [process for process in psutil.process_iter() if _has(process, mark)]
    wait_until(
        lambda: not [process for process in left if process.is_running()],
        what=lambda: f"the end of {[process for process in left if process.is_running()]}",
    )
