"""What random sagas are made of: tasks whose effects, and undone effects, are rows of the table ``effects``.

Each task is called with one part of a canvas, a JSON object that says what is to go wrong; :func:`canvas` makes a
signature of such a part, for a workflow within another, too.  What is broken works once its name is in ``mended``.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery, Task, chain, chord, group
from sqlalchemy import text

import byrd
from byrd.store import steps
from byrd.task import compound

Part = dict[str, Any]

app = Celery("random_sagas")
app.conf.update(
    byrd_lease_seconds=float(os.environ.get("SAGA_LEASE", "6")),
    byrd_max_preemptions=20,  # workers are killed often, and no step is to blame
)
engine = byrd.Byrd(app)
if "SAGA_LONGEST_PAUSE" in os.environ:  # else ten tries of a step after the pivot take a quarter of an hour
    steps._LONGEST_PAUSE_SECONDS = compound._LONGEST_PAUSE_SECONDS = float(os.environ["SAGA_LONGEST_PAUSE"])

TABLES = """
CREATE TABLE effects (
    id bigint GENERATED ALWAYS AS IDENTITY, run text, name text, what text, key text, detail text);
CREATE TABLE mended (name text PRIMARY KEY)"""
#: So long a step that hangs may take.
STALLED_SECONDS = 4
#: So many calls of ``few`` run at once.
MOST = 2

_INSERT = text("INSERT INTO effects (run, name, what, key, detail) VALUES (:run, :name, :what, :key, :detail)")


def write(what: str, run: str, name: str, key: str, detail: str = "") -> None:
    """Leave an effect, which nothing takes back."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(_INSERT, {"run": run, "name": name, "what": what, "key": key, "detail": detail})


def found(sql: str, **params: Any) -> Any:
    """Return the first value that a statement returns; None when there is none."""
    with engine.runtime.user_store.engine.begin() as conn:
        return conn.execute(text(sql), params).scalar()


def mended(name: str) -> bool:
    """Tell whether somebody has mended it."""
    return found("SELECT 1 FROM mended WHERE name = :name", name=name) is not None


def trouble(task: Task, part: Part) -> None:
    """Raise, so many times for the moment, or for good."""
    if task.request.retries < part["failures"]:
        raise ConnectionError(f"{part['name']} is not there yet")
    if part["breaks"] and not mended(part["name"]):
        raise ValueError(f"{part['name']} is broken")


def act(task: Task, part: Part) -> str:
    """Have an effect, or raise without one; what passes is tried again."""
    time.sleep(part["slow"])
    try:
        trouble(task, part)
    except ConnectionError as exc:
        raise task.retry(exc=exc, countdown=0.01) from exc
    write("do", task.request.root_id, part["name"], task.request.id)
    return f"did {part['name']}"


SAGA: dict[str, Any] = {"bind": True, "base": byrd.SagaTask, "max_retries": 20}
SOON = byrd.Retry(max_attempts=5, first=0.02, factor=1, jitter=False)


class CheckpointSagaTask(byrd.CheckpointTask, byrd.SagaTask):
    """A saga step that may stop, or wait, in the middle."""

    abstract = True


do = app.task(name="do", **SAGA)(act)
buy = app.task(name="buy", pivot=True, **SAGA)(act)
pay = app.task(name="pay", pivot=True, compensation=None, **SAGA)(act)
send = app.task(name="send", retriable=True, **SAGA)(act)
mail = app.task(name="mail", retriable=True, compensation=None, **SAGA)(act)
note = app.task(name="note", compensation=None, **SAGA)(act)
plain = app.task(name="plain", bind=True, max_retries=20)(act)


@app.task(name="tried", bind=True, base=byrd.SagaTask, byrd_retry=SOON)
def tried(self: Task, part: Part) -> str:
    """What a policy tries again."""
    time.sleep(part["slow"])
    trouble(self, part)
    write("do", self.request.root_id, part["name"], self.request.id)
    return f"did {part['name']}"


@app.task(name="few", byrd_limit=byrd.Limit(concurrency=MOST, name="few"), **SAGA)
def few(self: Task, part: Part) -> str:
    """What only so many do at once; it tells how many just did, and how many may."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(text("SELECT pg_advisory_xact_lock_shared(4712, 1)"))
        at_once = conn.execute(
            text(
                """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 4712 AND objid = 1
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
            )
        ).scalar_one()
        time.sleep(part["slow"])
        try:
            trouble(self, part)
        except ConnectionError as exc:
            raise self.retry(exc=exc, countdown=0.01) from exc
        row = {"run": self.request.root_id, "name": part["name"], "what": "do", "key": self.request.id}
        conn.execute(_INSERT, {**row, "detail": json.dumps([at_once, MOST])})
    return f"did {part['name']}"


@app.task(name="book", **SAGA)
def book(self: Task, part: Part) -> str:
    """Have an effect that can be asked for; it may raise after that."""
    time.sleep(part["slow"])
    write("do", self.request.root_id, part["name"], self.request.id)
    if self.request.retries < part["failures"]:
        raise self.retry(exc=ConnectionError(f"no answer from {part['name']}"), countdown=0.01)
    return f"did {part['name']}"


@app.task(name="stall", **SAGA)
def stall(self: Task, part: Part) -> str:
    """Run out of time before an effect that can be asked for, or after it."""
    hangs = part["breaks"] and not mended(part["name"])
    if hangs and part["asks"]:
        time.sleep(60)
    write("do", self.request.root_id, part["name"], self.request.id)
    time.sleep(60 if hangs else part["slow"])
    return f"did {part['name']}"


def find_effect(key: str, part: Part) -> Any:
    """Ask the outside world."""
    known = found("SELECT 1 FROM effects WHERE key = :key AND what = 'do'", key=key)
    return byrd.NOT_DONE if known is None else f"found {part['name']}"


book.confirm(find_effect)
stall.confirm(find_effect)


@app.task(name="trade", bind=True, base=CheckpointSagaTask, byrd_retry=SOON)
def trade(self: Any, part: Part) -> str:
    """Do two operations, or none."""
    run, name = self.request.root_id, part["name"]

    def operate(what: str) -> str:
        write(f"op {what}", run, name, op.key)
        return what

    def reverse(done: str, _what: str) -> None:
        write(f"try {done}", run, name, op.key)
        sql = "SELECT count(*) FROM effects WHERE key = :key AND what = :what"
        if found(sql, key=op.key, what=f"try {done}") <= part["undo_failures"]:
            raise ConnectionError(f"{done} cannot be undone now")
        write(f"unop {done}", run, name, op.key)

    with self.compound() as op:
        for what in ("sell", "buy"):
            op.do(what, operate, what, undo=reverse)
            time.sleep(part["slow"])
            self.checkpoint(cursor=what)
            if part["fails_at"] == what:
                trouble(self, part)
    write("do", run, name, self.request.id)
    return f"did {name}"


@app.task(name="doze", bind=True, base=CheckpointSagaTask, max_retries=20)
def doze(self: Any, part: Part) -> str:
    """Have an effect; wait a while, and for a signal perhaps, without a slot."""
    name = part["name"]
    self.step("do", write, "do", self.request.root_id, name, self.request.id)
    self.sleep("nap", part["slow"])
    if part["asks"]:
        self.wait_for(f"race:{name}", of="somebody", timeout=0.5, default=None)
    try:
        trouble(self, part)
    except ConnectionError as exc:
        raise self.retry(exc=exc, countdown=0.01) from exc
    return f"did {name}"


# -- what undoes them ------------------------------------------------------------------------------

PATIENCE: dict[str, Any] = {"bind": True, "max_retries": 2, "retry_backoff": False, "default_retry_delay": 0.02}


def take_back(self: Task, result: str | None, part: Part) -> None:
    """Undo it, and tell what was known of it; or raise, so many times for the moment, or for good."""
    why, name = byrd.current_compensation(), part["name"]
    assert why is not None
    assert (why.key, why.run_id) == (self.request.id, self.request.root_id)
    if self.request.retries < part["undo_failures"] or (part["undo_breaks"] and not mended(f"undo {name}")):
        raise RuntimeError(f"{name} cannot be undone now")
    time.sleep(0.01)
    write("undo", why.run_id, name, why.key, json.dumps([why.known, result]))


for undoable in (do, buy, send, tried, few, book, stall, trade):
    undoable.compensation(take_back, **PATIENCE)


@doze.compensation(base=byrd.CheckpointTask, **PATIENCE)
def take_back_if_agreed(self: Any, result: str | None, part: Part) -> None:
    """Undo it once somebody has agreed, or after a while."""
    self.wait_for(f"agreed:{part['name']}", of="somebody", timeout=0.5, default=None)
    take_back(self, result, part)


# -- canvases --------------------------------------------------------------------------------------

TASKS = {task.name: task for task in (do, buy, pay, send, mail, note, plain, tried, few, book, stall, trade, doze)}


@engine.workflow("random.inner")
def inner(part: Part) -> Any:
    """A canvas that is a run of its own, within another."""
    return canvas(part["canvas"])


def canvas(part: Part) -> Any:
    """Return the signature of a part."""
    sig: Any
    match part["kind"]:
        case "chain":
            sig = chain(*map(canvas, part["parts"]))
        case "group":
            sig = group([canvas(one) for one in part["parts"]])
        case "chord":
            sig = chord([canvas(one) for one in part["parts"]], canvas(part["body"]))
        case "saga":
            sig = byrd.saga(*map(canvas, part["parts"]))
        case "each":
            item = inner if part["task"] == "sub" else TASKS[part["task"]]
            how = {name: part[name] for name in ("limit", "tolerate", "results")}
            sig = byrd.each(item.s(), over=part["items"], **how)
        case "sub":
            sig = inner.si(part)
        case "sleep":
            sig = byrd.sleep(part["seconds"])
        case "wait":
            default = {"default": part["default"]} if "default" in part else {}
            sig = byrd.wait_for(f"{part['mode']}:{part['name']}", of="somebody", timeout=part["timeout"], **default)
        case kind:
            sig = TASKS[kind].si(part)
            if part["policy"]:
                sig.set(byrd_retry=SOON)
            if kind == "stall" and part["breaks"]:
                sig.set(soft_time_limit=STALLED_SECONDS)
    return sig
