"""The app of these tests: steps that do what a test needs to see, and workflows of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, chain, group

import byrd

app = Celery("shop")
app.conf.byrd_lease_seconds = float(os.environ.get("TEST_LEASE_SECONDS", "3"))
if "TEST_POLL_SECONDS" in os.environ:  # for so long a worker waits for a message before it asks Redis again
    app.conf.broker_transport_options = {"polling_interval": float(os.environ["TEST_POLL_SECONDS"])}
engine = byrd.Byrd(app)


@app.task
def price(sku: Any, factor: int = 2) -> Any:
    """A price."""
    return sku * factor


@app.task
def total(prices: list[Any]) -> Any:
    """Their sum."""
    return sum(prices)


@app.task
def refuse(*_: Any) -> None:
    """Raise, with what rich and HTML would take for markup."""
    raise ValueError("[bold red]no[/] <b>money</b> left")


@app.task(bind=True, max_retries=3)
def unlucky(self: Task, delay: float) -> None:
    """Fail, and be tried again after ``delay`` seconds."""
    raise self.retry(countdown=delay, exc=ConnectionError("the bank is closed"))


@app.task
def hold(path: str, value: Any = None) -> Any:
    """Run until the file is there."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task(bind=True)
def kill_twice_and_hold(self: Task, folder: str) -> int:
    """Kill the process that runs it, in the first two attempts; then run until the file is there."""
    number: int = self.request.byrd.number
    if number < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    hold(f"{folder}/go")
    return number


@app.task(rate_limit="1/h")
def slow_down(value: int) -> int:
    """A task that Celery lets start once an hour."""
    return value


@app.task(byrd_limit=byrd.Limit("1/h", burst=2, concurrency=1, key="host", name="hosts"))
def visit(host: str, path: str) -> str:
    """Run until the file is there; one at a time for each host."""
    hold(path)
    return host


@app.task
def mourn(request: Any, exc: Any, traceback: Any) -> str:
    """An errback."""
    return str(exc)


@app.task
def cheer(value: Any) -> str:
    """A callback."""
    return f"sold for {value}"


@app.task(base=byrd.SagaTask)
def reserve(room: str) -> dict[str, str]:
    """A step that can be undone."""
    return {"room": room}


@reserve.compensation(max_retries=0)
def release(reservation: dict[str, str], room: str) -> str:
    """Undo it, once the file is there."""
    if not Path(room).exists():
        raise RuntimeError("the hotel does not answer")
    return f"released {reservation['room']}"


@app.task(bind=True, base=byrd.CheckpointTask)
def walk(self: Any, number: int, path: str) -> int:
    """Go over numbers with checkpoints: stand at the last one until the file is there."""

    def numbers(cursor: int | None) -> Any:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, number))

    def step(n: int) -> int:
        if n == 1:
            raise ValueError("bad number")
        while n == number - 1 and not Path(path).exists():
            time.sleep(0.02)
        return n

    self.step("log in", lambda: "token")
    return int(self.iterate(numbers, step, batch_size=2, item_retries=0).completed)


@engine.workflow("shop.order")
def order(number: int, *, factor: int = 2) -> Any:
    """Price some things and sum up."""
    return chain(group(price.s(n, factor) for n in range(number)) | total.s(), cheer.s())


@engine.workflow("shop.sale")
def sale() -> Any:
    """A bit of everything."""
    member = chain(price.s(1), price.s(3).set(link=cheer.s()))
    return chain(price.s(5), group(member, price.si(2)), total.s(), refuse.s().on_error(mourn.s()), cheer.s())


@engine.workflow("shop.trip")
def trip(path: str) -> Any:
    """A saga that fails; its rollback fails until the file is there."""
    return chain(reserve.si(path), reserve.si(path), refuse.si())


@engine.workflow("shop.approval")
def approval(timeout: float | None = None) -> Any:
    """Something that a person has to approve."""
    return chain(price.s(1), byrd.wait_for("approval", timeout=timeout), cheer.s())


@engine.workflow("shop.purchase")
def purchase() -> Any:
    """Something that two people have to approve."""
    return group(
        byrd.wait_for("purchase:money", of="finance [EU]"), byrd.wait_for("purchase:law", of="legal", timeout=3600)
    )


@engine.workflow("shop.late", timeout=0.5)
def late(path: str) -> Any:
    """A run with a deadline."""
    return hold.si(path)
