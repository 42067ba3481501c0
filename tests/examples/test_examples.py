"""The examples, each with a real worker, and what they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster import ROOT, Cluster, Worker, wait_until

EXAMPLES = ROOT / "examples"


def environment(cluster: Cluster, folder: Path) -> dict[str, str]:
    """What a terminal in ``folder`` has: its own modules first, and not the repository's ``tasks``."""
    path = os.pathsep.join([str(folder), cluster.env["PYTHONPATH"]])
    return {**cluster.env, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def worker(cluster: Cluster, module: str, folder: Path = EXAMPLES) -> Worker:
    return cluster.worker(module, env=environment(cluster, folder))


def run(cluster: Cluster, *command: str, folder: Path = EXAMPLES, **env: str) -> list[str]:
    """Run a command in the folder; return the lines that it prints."""
    env = {**environment(cluster, folder), **env}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextmanager
def program(cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start an example; it waits for its run, and is killed if the test fails before."""
    command, env = [sys.executable, *arguments], environment(cluster, EXAMPLES)
    with subprocess.Popen(command, cwd=EXAMPLES, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_shop(cluster: Cluster) -> None:
    worker(cluster, "shop")
    assert run(cluster, sys.executable, "shop.py") == ["order 42 is paid: 16.20"]
    assert run(cluster, sys.executable, "shop.py") == ["order 42 is paid: 16.20"]
    assert cluster.rows("SELECT workflow, key, status FROM byrd.runs") == [("shop.order", "order-42", "succeeded")]


def test_imports_outlive_a_killed_worker(cluster: Cluster, tmp_path: Path) -> None:
    lines = [f"Customer {n},customer{n}@example.org" for n in range(50_000)]
    lines[12_345] = "Nobody,no address"
    file = tmp_path / "customers.csv"
    file.write_text("\n".join(lines) + "\n")
    first = worker(cluster, "imports")
    with program(cluster, "imports.py", str(file)) as waits:
        wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.checkpoints WHERE completed > 0 AND NOT done"))
        first.kill()
        worker(cluster, "imports")
        output, _ = waits.communicate(timeout=120)
    assert output.splitlines() == [
        "49999 customers imported",
        "refused: Nobody,no address (ValueError: 'no address' is not an e-mail address)",
    ]
    assert cluster.rows("SELECT count(*), count(DISTINCT email) FROM customers") == [(49_999, 49_999)]
    assert cluster.rows("SELECT attempt, preemptions FROM byrd.steps") == [(2, 1)]


def test_imports_of_the_bundled_file(cluster: Cluster) -> None:
    worker(cluster, "imports")
    assert run(cluster, sys.executable, "imports.py", "customers.csv") == [
        "7 customers imported",
        "refused: Alan Turing,no address (ValueError: 'no address' is not an e-mail address)",
    ]
    assert ("Hamilton, Margaret",) in cluster.rows("SELECT name FROM customers")


def trip(cluster: Cluster, *arguments: str) -> list[str]:
    """Book a trip; return what the program prints, but for the id of the run."""
    return [line for line in run(cluster, sys.executable, "trip.py", *arguments) if not line.startswith("byrd show")]


def test_trip(cluster: Cluster) -> None:
    worker(cluster, "trip")
    assert trip(cluster, "Rome", "700") == [
        "the trip has succeeded",
        "0 trip.book_hotel succeeded",
        "1 trip.book_flight succeeded",
        "2 trip.pay succeeded",
        "3 trip.confirm_by_mail succeeded",
        "hotels: a room in Rome, booked",
        "flights: a seat to Rome, booked",
        "payments: 700 paid, booked",
        "mails: a mail about Rome, booked",
    ]
    assert trip(cluster, "Rome", "2000") == [
        "the trip has failed",
        "0 trip.book_hotel succeeded",
        "1 trip.book_flight succeeded",
        "2 trip.pay failed",
        "3 trip.confirm_by_mail skipped",
        "4 trip.book_flight.compensation succeeded",
        "5 trip.book_hotel.compensation succeeded",
        "hotels: a room in Rome, cancelled",
        "flights: a seat to Rome, cancelled",
    ]


def test_trip_whose_flight_is_refused(cluster: Cluster) -> None:
    worker(cluster, "trip")
    assert trip(cluster, "Rome", "700", "--fail", "flight") == [
        "the trip has failed",
        "0 trip.book_hotel succeeded",
        "1 trip.book_flight failed",
        "2 trip.pay skipped",
        "3 trip.confirm_by_mail skipped",
        "4 trip.book_hotel.compensation succeeded",
        "hotels: a room in Rome, cancelled",
    ]


def test_trip_whose_answer_is_lost_is_booked_once(cluster: Cluster) -> None:
    worker(cluster, "trip")
    assert trip(cluster, "Rome", "700", "--fail", "flight-answer")[2::4] == [
        "1 trip.book_flight succeeded in attempt 2",
        "flights: a seat to Rome, booked",
    ]


def test_trip_whose_mail_is_late_is_not_cancelled(cluster: Cluster) -> None:
    worker(cluster, "trip")
    lines = trip(cluster, "Rome", "700", "--fail", "mail")
    assert lines[0] == "the trip has succeeded"
    assert lines[4] == "3 trip.confirm_by_mail succeeded in attempt 3"
    assert lines[-1] == "mails: a mail about Rome, booked"


def test_trip_whose_flight_can_be_cancelled_only_later(cluster: Cluster) -> None:
    worker(cluster, "trip")
    lines = trip(cluster, "Rome", "2000", "--fail", "cancel")
    assert lines[5:] == [
        "4 trip.book_flight.compensation succeeded in attempt 3",
        "5 trip.book_hotel.compensation succeeded",
        "hotels: a room in Rome, cancelled",
        "flights: a seat to Rome, cancelled",
    ]


def test_approval(cluster: Cluster) -> None:
    worker(cluster, "approval")
    byrd = [sys.executable, "-c", "from byrd.cli import main; main()", "-A", "approval"]
    with program(cluster, "approval.py", "900") as waits:
        wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.steps WHERE status = 'waiting'"))
        [(run_id,)] = cluster.rows("SELECT id::text FROM byrd.runs")
        assert run_id[:8] in " ".join(run(cluster, *byrd, "waiting", "--of", "finance", COLUMNS="60"))
        run(cluster, *byrd, "signal", run_id[:8], "approval", '{"ok": true, "by": "ann"}')
        output, _ = waits.communicate(timeout=60)
    assert output.splitlines()[1] == "900.00 paid, decided by ann"
    assert run(cluster, sys.executable, "approval.py", "9", "0.2")[1] == "9.00 refused, decided by nobody"


def test_transaction(cluster: Cluster) -> None:
    worker(cluster, "transaction")
    for number in (1, 3):  # the order in between was rolled back, and left a gap
        assert run(cluster, sys.executable, "transaction.py") == [
            f"order {number} is on its way",
            "rolled back: 0 runs more than before",
        ]
    assert cluster.rows("SELECT key FROM byrd.runs ORDER BY created_at") == [("order-1",), ("order-3",)]
    assert cluster.rows("SELECT count(*) FROM orders") == [(2,)]


def test_celerys_first_steps_become_durable_by_the_diff(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("tasks.py", "durable.diff"):
        shutil.copy(EXAMPLES / "first_steps" / name, tmp_path)
    subprocess.run(["git", "apply", "-p0", "--verbose", "durable.diff"], cwd=tmp_path, check=True, capture_output=True)
    worker(cluster, "tasks", tmp_path)
    program = (
        "from tasks import *; print(engine.submit(add.s(4, 4) | add.s(8)).get(timeout=60), add.delay(4, 4).get(60))"
    )
    assert run(cluster, sys.executable, "-c", program, folder=tmp_path) == ["16 8"]
    assert cluster.rows("SELECT count(*) FROM byrd.steps") == [(2,)]  # what delay() sends is no step


def test_the_readme_shows_the_shop() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (EXAMPLES / "shop.py").read_text() in blocks


def test_the_readme_of_the_examples_shows_the_diff() -> None:
    [shown] = re.findall(r"```diff\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    hunk = (EXAMPLES / "first_steps" / "durable.diff").read_text().partition("@@\n")[2]
    changed = [line for line in shown.splitlines() if line.startswith(("+", "-"))]
    assert changed == [line for line in hunk.splitlines() if line.startswith(("+", "-"))]
    assert len(changed) == 2


#: What an example needs beside its worker.
HELPERS = {"trip_service"}


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in HELPERS))
def test_each_example_can_be_started_by_name(example: str) -> None:
    assert f"\n{example}: celery -A {example} worker" in f"\n{(EXAMPLES / 'Procfile').read_text()}"
    assert f"[{example}.py]({example}.py)" in (EXAMPLES / "README.md").read_text()
