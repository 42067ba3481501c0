"""Flower on a real worker: steps by the names of their tasks, with their run, and their result or error."""

from __future__ import annotations

import base64
import json
import socket
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.beat.conftest import APP, Process, Start, wait_until
from tests.cluster import Cluster

USER = "ada:note-g-of-1843"


@pytest.fixture
def flower(start: Start, cluster: Cluster) -> tuple[Process, str]:
    """A Flower with one user, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(
        "celery", "-A", APP, "flower",
        BYRD_DATABASE_URL=cluster.database_url, FLOWER_PORT=str(port), FLOWER_BASIC_AUTH=USER,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answer(f"{url}/healthcheck")[0] == 200, "Flower answers", seconds=60)
    return process, url


def answer(url: str, user: str | None = None) -> tuple[int, bytes]:
    """The status, 0 if nobody is there, and the text of a page."""
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as response:
            return response.status, response.read()
    except HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read()
    except (URLError, ConnectionError):
        return 0, b""


def test_steps_are_shown_with_their_run_and_their_outcome(cluster: Cluster, flower: tuple[Process, str]) -> None:
    _, url = flower
    engine = cluster.app(APP).engine
    cluster.worker(APP, concurrency=1, options=["--task-events"])
    run = engine.submit("shop.report", "monday")
    with pytest.raises(RuntimeError, match="bound to fail"):
        run.get(timeout=30)

    def shown() -> dict[str, Any]:
        tasks = {task["name"]: task for task in json.loads(answer(f"{url}/api/tasks", USER)[1]).values()}
        return tasks if {task["state"] for task in tasks.values()} == {"SUCCESS", "FAILURE"} else {}

    tasks = wait_until(shown, "Flower shows the end of both steps")
    assert {task["root_id"] for task in tasks.values()} == {run.id}
    assert all(run.id in task["args"] for task in tasks.values())
    assert tasks[f"{APP}.note"]["result"] == "'monday'"
    assert tasks[f"{APP}.fail"]["exception"] == "RuntimeError('monday was bound to fail')"
    page = answer(f"{url}/task/{tasks[f'{APP}.fail']['uuid']}", USER)[1].decode()
    assert run.id in page
    assert "monday was bound to fail" in page


def test_it_listens_on_loopback_and_asks_who_is_there_where_that_is_set(flower: tuple[Process, str]) -> None:
    process, url = flower
    assert answer(f"{url}/tasks")[0] == 401
    assert answer(f"{url}/tasks", USER)[0] == 200
    listening = [
        link.laddr.ip for link in psutil.Process(process.popen.pid).net_connections("tcp") if link.status == "LISTEN"
    ]
    assert listening == ["127.0.0.1"]
