"""`byrd signal` and `byrd waiting`, and what `why` and `show` say of waits."""

from __future__ import annotations

import re
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, group

import byrd
from tests.cli.conftest import APP, Cli
from tests.cluster import Cluster, wait_until


@pytest.fixture(scope="module")
def shop(module_cluster: Cluster) -> Any:
    module_cluster.worker(APP)
    return module_cluster.app(APP)


def waits(run: Any, kind: str = "wait") -> Any:
    """Return the run's wait, once it waits."""
    return wait_until(lambda: next((s for s in run.steps() if s.kind == kind and s.status == "waiting"), None))


def test_signal_and_waiting(shop: Any, shared_cli: Cli) -> None:
    run = shop.approval.submit(3600)
    waits(run)
    listed = shared_cli("waiting", "--signal", "approval")
    [head, line] = listed.out.splitlines()
    assert head.split() == ["run", "workflow", "step", "signal", "since", "until", "then"]
    assert re.match(rf"{run.id[:8]} +shop\.approval +1 +approval +[\d:]+ \(.*ago\) .*\(in .*\) +fails", line)
    answer = shared_cli("signal", run.id[:8], "approval", '{"ok": true}')
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"Signal approval is sent to run {run.id[:8]}")
    assert run.get(timeout=10) == "sold for {'ok': True}"
    [sent] = [row for row in run.history() if row["event"] == "signalled"]
    assert sent["detail"]["by"].endswith(f"@{socket.gethostname()}")
    assert shared_cli("waiting", "--signal", "approval").out == "Nothing waits for a signal like that.\n"


def test_whom_they_wait_for(shop: Any, shared_cli: Cli) -> None:
    run = shop.purchase.submit()
    waits(run)
    head, money, law = shared_cli("waiting", "--signal", "purchase:*").out.splitlines()
    assert head.split() == ["run", "workflow", "step", "signal", "of", "since", "until", "then"]
    assert re.match(rf"{run.id[:8]} +shop\.purchase +0 +purchase:money +finance \[EU\] +{TIME}", money)
    assert re.match(rf"{run.id[:8]} +shop\.purchase +1 +purchase:law +legal +{TIME}", law)
    other = shop.engine.submit(byrd.wait_for("purchase:other"))
    assert re.search(r" purchase:other +- ", shared_cli("waiting", "--signal", "purchase:*").out)
    other.cancel()
    assert len(shared_cli("waiting", "--of", "legal").out.splitlines()) == 2
    assert shared_cli("waiting", "--of", "nobody").out == "Nothing waits for a signal like that.\n"
    [found] = shared_cli("waiting", "--of", "finance [EU]", "--signal", "purchase:*", "--json").json["waiting"]
    assert (found["run"], found["step"], found["of"]) == (run.id, 0, "finance [EU]")
    assert shared_cli("waiting", "--of", "legal", "--signal", "purchase:money", "--json").json == {"waiting": []}
    for wrong in (("--of", ""), ("--signal", "*:law")):
        answer = shared_cli("waiting", *wrong, "--json")
        assert (answer.status, answer.json["error"]["type"]) == (1, "CanvasError")

    drawn = shared_cli("show", run.id).out
    assert "byrd.wait_for purchase:money of finance [EU]  since " in drawn
    assert "byrd.wait_for purchase:law of legal  until " in drawn
    steps = shared_cli("show", run.id, "--json").json["steps"]
    assert [s["signal_of"] for s in steps if s["kind"] == "wait"] == ["finance [EU]", "legal"]
    money, law = why(shared_cli, run)
    assert re.search(
        rf"waits for the signal 'purchase:money' of finance \[EU\] since {TIME} \(.*\), for as long", money
    )
    assert re.search(rf"waits for the signal 'purchase:law' of legal since {TIME} \(.*\), until {TIME}", law)
    run.cancel()


def test_why_tells_apart_whom_many_wait_for(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(group(byrd.wait_for("approval", of=of) for of in ("ann", "bea") for _ in range(4)))
    ann, bea = why(shared_cli, run)
    assert ann.startswith(
        "4 steps of byrd.wait_for (no. 0 to 3) wait for the signal 'approval' of ann, the first since "
    )
    assert bea.startswith(
        "4 steps of byrd.wait_for (no. 4 to 7) wait for the signal 'approval' of bea, the first since "
    )
    run.cancel()


def test_json(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(byrd.wait_for("n", timeout=60, default=[1]))
    step = waits(run)
    [found] = shared_cli("waiting", "-s", "n", "--json").json["waiting"]
    assert found["until"] == step.run_at.isoformat().replace("+00:00", "Z")
    del found["since"], found["until"], found["title"]
    assert found == {
        "run": run.id, "workflow": None, "run_status": "running", "step": 0, "signal": "n", "of": None,
        "has_default": True, "default": [1],
    }  # fmt: skip
    assert shared_cli("signal", run.id, "n", "--json").json == {"run": run.id, "signal": "n", "status": "succeeded"}
    assert run.get() is None


def test_numbers_below_zero_are_payloads(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(byrd.wait_for("n"))
    assert shared_cli("signal", run.id, "n", "-1").status == 0
    assert run.get(timeout=5) == -1


def test_what_is_refused(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(byrd.wait_for("n"))
    for args, error in (
        ((run.id, "n", "yes"), "ArgumentError"),
        ((run.id, "a b"), "CanvasError"),
        (("00000000-0000-0000-0000-000000000000", "n"), "RunNotFoundError"),
    ):
        answer = shared_cli("signal", *args, "--json")
        assert (answer.status, answer.json["error"]["type"]) == (1, error)
    run.cancel()
    answer = shared_cli("signal", run.id, "n", "--json")
    assert (answer.status, answer.json["error"]["type"]) == (1, "IllegalTransitionError")


def why(cli: Cli, run: Any) -> list[str]:
    sentences: list[str] = cli("why", run.id, "--json").json["reasons"]
    return sentences


TIME = r"(?:[\d-]+ )?[\d:]+"


def test_why_of_a_sleep(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(chain(byrd.sleep(3600), shop.price.s()))
    [said] = why(shared_cli, run)
    assert re.fullmatch(rf"Step 0 \(byrd\.sleep\) sleeps until {TIME} \(in (60 min|1 h)[\d mins]*\)\.", said)
    run = shop.engine.submit(group(byrd.sleep(until=datetime.now(UTC) + timedelta(days=3)) for _ in range(5)))
    [said] = why(shared_cli, run)
    assert re.fullmatch(rf"5 steps of byrd\.sleep \(no\. 0 to 4\) sleep, the first until {TIME} \(in 3 days\)\.", said)


def test_why_of_a_wait(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(byrd.wait_for("approval"))
    [said] = why(shared_cli, run)
    send = rf"`byrd signal {run.id[:8]} approval \[JSON\]` sends it"
    begin = rf"Step 0 \(byrd\.wait_for\) waits for the signal 'approval' since {TIME} \(.* ago\)"
    assert re.fullmatch(rf"{begin}, for as long as it takes; {send}\.", said)
    run.pause()
    paused, said = why(shared_cli, run)
    assert paused.startswith("It is paused since")
    assert re.fullmatch(rf"{begin}, for as long as it takes; {send}\.", said)
    run = shop.engine.submit(byrd.wait_for("approval", timeout=3600))
    [said] = why(shared_cli, run)
    assert re.search(rf", until {TIME} \(in .*\): then it fails; `byrd signal", said)
    run = shop.engine.submit(byrd.wait_for("approval", timeout=3600, default={"ok": False}))
    [said] = why(shared_cli, run)
    assert re.search(
        rf', until {TIME} \(in .*\): then it goes on with its default, {{"ok": false}}; `byrd signal', said
    )
    run = shop.engine.submit(group(byrd.wait_for("approval") for _ in range(4)))
    [said] = why(shared_cli, run)
    assert said.startswith("4 steps of byrd.wait_for (no. 0 to 3) wait for the signal 'approval', the first since ")


def test_why_of_a_wait_that_is_late(cluster: Cluster, byrd_cli: Cli) -> None:
    shop = cluster.app(APP)
    run = shop.engine.submit(byrd.sleep(0))
    [said] = why(byrd_cli, run)
    assert said.endswith("; a worker, or `byrd relay`, ends it once one is started.")
    run.pause()
    _, said = why(byrd_cli, run)
    assert said.endswith(", and ends when the run is resumed.")


def test_show_draws_waits(shop: Any, shared_cli: Cli) -> None:
    run = shop.engine.submit(chain(byrd.sleep(0), byrd.wait_for("approval", timeout=3600), shop.price.s()), 5)
    waits(run)
    wait_until(lambda: run.steps()[1].status == "waiting")
    drawn = shared_cli("show", run.id).out
    assert re.search(r"✔ 0 byrd\.sleep .*→ 5", drawn)
    assert re.search(rf"◷ 1 byrd\.wait_for approval  until {TIME} \(in ", drawn)
    assert "1 waiting" in drawn
    steps = shared_cli("show", run.id, "--json").json["steps"]
    assert [(s["kind"], s["signal"], s["status"]) for s in steps[:2]] == [
        ("wait", None, "succeeded"),
        ("wait", "approval", "waiting"),
    ]
    run.cancel()
