"""Smoke tests in the words of Celery's own: setups, nodes, kill, restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_celery import CeleryTestSetup

import byrd
from tests.cluster import wait_until


def waiting_steps(run: byrd.Run) -> list[Any]:
    """The steps that run now and will until the test lets them end."""
    return [step for step in run.steps() if step.status == "running" and step.task == "tests.apps.basic.wait_for_file"]


def test_a_run_outlives_its_worker(celery_setup: CeleryTestSetup, basic: Any, tmp_path: Path) -> None:
    assert celery_setup.ready()
    go = tmp_path / "go"
    run = basic.engine.submit(basic.add.s(1, 2) | basic.wait_for_file.si(str(go), "waited") | basic.echo.s())
    (running,) = wait_until(lambda: waiting_steps(run), what="a running step")
    hosts = {worker.id: worker.hostname for worker in basic.engine.workers()}
    node = next(node for node in celery_setup.worker_cluster if node.hostname() == hosts[running.worker_id])
    assert node.container.worker.pid in [process["pid"] for process in node.get_running_processes_info(["pid"])]

    node.kill()
    go.touch()
    assert run.get(timeout=60) == "waited"
    assert [entry["event"] for entry in run.history()].count("preempted") == 1

    node.restart()
    node.assert_log_exists("ready.")
    assert basic.engine.submit(basic.add.s(1, 2)).get(timeout=30) == 3


def test_a_run_outlives_the_broker(celery_setup: CeleryTestSetup, basic: Any, tmp_path: Path) -> None:
    assert celery_setup.ready(control=True)
    go = tmp_path / "go"
    run = basic.engine.submit(basic.wait_for_file.s(str(go), 1) | basic.add.s(2))
    wait_until(lambda: waiting_steps(run), what="a running step")

    celery_setup.broker.kill()
    later = basic.engine.submit(basic.add.s(3, 4))
    go.touch()
    wait_until(lambda: run.steps()[0].status == "succeeded", what="end of the step")

    celery_setup.broker.restart()
    assert run.get(timeout=60) == 3
    assert later.get(timeout=60) == 7
    assert all(node.container.status == "running" for node in celery_setup.worker_cluster)
