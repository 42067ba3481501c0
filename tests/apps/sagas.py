"""Saga tasks whose effects, and undone effects, are rows of the table ``effects``: an outside world of their own."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from celery import Celery, Task
from sqlalchemy import text

import byrd

app = Celery("sagas")
app.conf.byrd_rollback_stuck_hook = json.loads(os.environ.get("SAGA_HOOKS", "[]"))
app.conf.byrd_mail_server, app.conf.byrd_mail_from = os.environ.get("SAGA_MAIL"), "byrd@example.com"
app.conf.byrd_lease_seconds = float(os.environ.get("SAGA_LEASE", "6"))
engine = byrd.Byrd(app)
FILES = Path(os.environ.get("SAGA_FILES", "/nowhere"))

TABLE = """CREATE TABLE IF NOT EXISTS effects (
    id bigint GENERATED ALWAYS AS IDENTITY, run text, name text, what text, key text, detail text)"""


def write(what: str, run: str, name: str, key: str, detail: str = "") -> None:
    """Leave an effect, which nothing takes back."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(
            text("INSERT INTO effects (run, name, what, key, detail) VALUES (:run, :name, :what, :key, :detail)"),
            {"run": run, "name": name, "what": what, "key": key, "detail": detail},
        )


def exists(name: str) -> bool:
    """Tell whether the test has made a file of this name."""
    return (FILES / name).exists()


def die_once(name: str) -> None:
    """Kill this process by SIGKILL, if the test has asked for it, once."""
    try:
        (FILES / f"{name}.die").unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, base=byrd.SagaTask)
def do(self: Task, name: str) -> str:
    """Have an effect."""
    write("do", self.request.root_id, name, self.request.id)
    die_once(name)
    return f"did {name}"


@do.compensation(bind=True, max_retries=2, retry_backoff=False, default_retry_delay=0.02)
def undo(self: Task, result: str | None, name: str) -> None:
    """Take it back; as often as a file of its name is there, raise instead, or hang."""
    why = byrd.current_compensation()
    assert why is not None
    assert why.key == self.request.id
    while exists(f"{name}.hangs"):
        time.sleep(0.02)
    if exists(f"{name}.stuck"):
        raise RuntimeError(f"{name} cannot be undone now")
    time.sleep(0.01)
    write("undo", self.request.root_id, name, why.key, f"{result} because of {why.reason}")
    die_once(f"undo {name}")


@app.task(bind=True, base=byrd.SagaTask)
def book(self: Task, name: str) -> str:
    """Have an effect that can be asked for."""
    write("do", self.request.root_id, name, self.request.id)
    die_once(name)
    while exists(f"{name}.hangs"):
        time.sleep(0.02)
    if exists(f"{name}.raises"):
        raise ValueError("it raised after its effect")
    return f"booked {name}"


@book.confirm
def find_booking(key: str, name: str) -> Any:
    """Ask the outside world."""
    with engine.runtime.user_store.engine.begin() as conn:
        found = conn.execute(text("SELECT 1 FROM effects WHERE key = :key AND what = 'do'"), {"key": key}).first()
    return byrd.NOT_DONE if found is None else f"found {name}"


@book.compensation(bind=True)
def cancel_booking(self: Task, result: str | None, name: str) -> None:
    """Take it back."""
    why = byrd.current_compensation()
    assert why is not None
    write("undo", self.request.root_id, name, why.key, f"{result}, known: {why.known}")


@app.task(bind=True, base=byrd.SagaTask, soft_time_limit=1)
def hurry(self: Task, name: str) -> None:
    """Have an effect, and then take too long."""
    write("do", self.request.root_id, name, self.request.id)
    time.sleep(30)


@hurry.compensation
def unhurry(result: None, name: str) -> None:
    """Take it back, whatever has become of it."""
    why = byrd.current_compensation()
    assert why is not None
    write("undo", why.run_id, name, why.key, f"{result}, known: {why.known}")


@app.task(bind=True, base=byrd.SagaTask, pivot=True, compensation=None)
def pay(self: Task, *_: Any) -> str:
    """Pass the point of no return."""
    write("do", self.request.root_id, "pay", self.request.id)
    return "paid"


@app.task(base=byrd.SagaTask, retriable=True, compensation=None)
def mail(name: str) -> str:
    """Raise for as long as there is a file."""
    if exists(f"{name}.down"):
        raise ConnectionError("the mail server is down")
    return "sent"


@app.task
def fail(*_: Any) -> None:
    """Raise ValueError."""
    raise ValueError("no")


@app.task
def down(name: str) -> str:
    """Raise for as long as there is a file."""
    if exists(f"{name}.down"):
        raise ConnectionError("it is down")
    return "up"


@app.task
def until(name: str) -> str:
    """Run until the file exists."""
    while not exists(name):
        time.sleep(0.02)
    return name


@app.task(bind=True, base=byrd.CheckpointTask)
def loop(self: byrd.CheckpointTask, name: str) -> None:
    """Go on until a checkpoint says to stop."""
    write("do", self.request.root_id, name, self.request.id)
    for number in range(3000):
        self.checkpoint(cursor=number)
        time.sleep(0.02)


class StoppableSaga(byrd.CheckpointTask, byrd.SagaTask):
    """A saga step with checkpoints."""

    abstract = True


@app.task(bind=True, base=StoppableSaga)
def loop_saga(self: Any, name: str) -> None:
    """Go on until a checkpoint says to stop, having done something."""
    write("do", self.request.root_id, name, self.request.id)
    for number in range(3000):
        self.checkpoint(cursor=number)
        time.sleep(0.02)


@loop_saga.compensation
def unloop(result: None, name: str) -> None:
    """Take it back."""
    why = byrd.current_compensation()
    assert why is not None
    write("undo", why.run_id, name, why.key, f"{result}, known: {why.known}")


@app.task(bind=True, base=StoppableSaga)
def rent(self: Any, name: str) -> None:
    """Have an effect that can be asked for, unless there is a file; then go on until a checkpoint says to stop."""
    if not exists(f"{name}.none"):
        write("do", self.request.root_id, name, self.request.id)
    write("begun", self.request.root_id, name, self.request.id)
    for number in range(3000):
        self.checkpoint(cursor=number)
        time.sleep(0.02)


@rent.confirm
def find_rental(key: str, name: str) -> Any:
    """Ask the outside world, and say that it was asked."""
    with engine.runtime.user_store.engine.begin() as conn:
        run, done = conn.execute(
            text("SELECT min(run), bool_or(what = 'do') FROM effects WHERE key = :key"), {"key": key}
        ).one()
    write("asked", run, name, key)
    return f"found {name}" if done else byrd.NOT_DONE


@rent.compensation
def end_rental(result: str | None, name: str) -> None:
    """Take it back."""
    why = byrd.current_compensation()
    assert why is not None
    write("undo", why.run_id, name, why.key, f"{result}, known: {why.known}")


@app.task(bind=True, base=StoppableSaga, autoretry_for=(ConnectionError,), max_retries=3, default_retry_delay=0.02)
def lend(self: Any, name: str) -> str:
    """Have an effect, and die once; or, where there is a file, go on until a checkpoint says to stop."""
    write("do", self.request.root_id, name, self.request.id)
    die_once(name)
    while exists(f"{name}.loops"):
        self.checkpoint(cursor=0)
        time.sleep(0.02)
    return f"lent {name}"


@lend.confirm
def find_loan(key: str, name: str) -> Any:
    """Say what the test wants it to say; if it is to raise, raise once and then say True."""
    answer = FILES / f"{name}.says"
    found = answer.read_text()
    if found == "raises":
        answer.write_text("true")
        raise ConnectionError("nobody knows")
    return json.loads(found)


@lend.compensation(bind=True, autoretry_for=(ConnectionError,), retry_backoff=False, default_retry_delay=0.02)
def end_loan(self: Task, result: Any, name: str) -> None:
    """Take it back."""
    why = byrd.current_compensation()
    assert why is not None
    write("undo", why.run_id, name, why.key, f"{result}, known: {why.known}")


@app.task(base=byrd.SagaTask)
def tell(name: str) -> str:
    """What tells, when it is undone, all that it knows."""
    return name


@tell.compensation
def tell_all(_result: str, _name: str) -> dict[str, Any]:
    """Return what there is to know of a compensation."""
    why = byrd.current_compensation()
    assert why is not None
    return asdict(why)


@app.task(base=byrd.SagaTask)
def ship(name: str) -> str:
    """What is undone elsewhere, and in time."""
    return f"shipped {name}"


@ship.compensation(bind=True, queue="returns", time_limit=3)
def send_back(self: Task, result: str, name: str) -> str:
    """Hang for as long as there is a file; then take it back."""
    while exists(f"{name}.hangs"):
        time.sleep(0.02)
    write("undo", self.request.root_id, name, self.request.id, result)
    return str(self.request.delivery_info["routing_key"])


@app.task(bind=True, queue="returns", autoretry_for=(ConnectionError,), max_retries=1, default_retry_delay=0.02)
def pay_back(self: Task, result: str, name: str) -> str:
    """A task that is there for others, too; it raises for as long as there is a file."""
    if exists(f"{name}.down"):
        raise ConnectionError("the bank is closed")
    write("undo", self.request.root_id, name, self.request.id, result)
    return f"paid back {name}"


@app.task(base=byrd.SagaTask)
def sell(name: str) -> str:
    """What another task undoes."""
    return f"sold {name}"


sell.compensation(pay_back)


@app.task
def told(payload: dict[str, Any]) -> None:
    """Be told that a rollback is stuck."""
    write("told", payload["run"], payload["task"], str(payload["notice"]))


@app.task(base=byrd.SagaTask)
def insure(name: str) -> str:
    """What somebody has to agree to, before it is undone."""
    return name


@insure.compensation(bind=True, base=byrd.CheckpointTask)
def end_insurance(self: Any, _result: str, name: str) -> None:
    """Wait for somebody."""
    answer = self.wait_for("agreed", of="the insurance")
    write("undo", self.request.root_id, name, self.request.id, str(answer))


@app.task(base=byrd.SagaTask)
def forgetful() -> None:
    """A saga task that does not say how it is undone."""


@app.task(base=byrd.SagaTask)
def slow_undo(name: str) -> str:
    """What takes its time to be undone."""
    return name


@slow_undo.compensation
def undo_slowly(_result: str, name: str) -> None:
    """Wait for as long as there is a file."""
    while exists(f"{name}.stuck"):
        time.sleep(0.02)
