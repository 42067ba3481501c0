"""A saga: a hotel, a flight, a payment that nothing takes back, and an e-mail that gets out sooner or later.

It is booked with the service in trip_service.py, which fails on command: ``python trip.py Rome 700 --fail flight``.
"""

import json
import sys
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from celery import Celery, Task, chain

import byrd
import trip_service

app = Celery("trip")
engine = byrd.Byrd(app)
#: The service may be away for a moment.
PATIENT: dict[str, Any] = {"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 3, "countdown": 0.5}}


class RefusedError(Exception):
    """The service has said no: to ask again would not help."""


def ask(method: str, url: str, **body: Any) -> dict[str, Any]:
    """Ask the service; raise OSError when it does not answer, and RefusedError when it says no."""
    try:
        with urlopen(Request(url, json.dumps(body).encode(), method=method), timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except HTTPError as exc:
        if exc.code < 500:
            raise RefusedError(json.load(exc)["error"]) from None
        raise


def find(url: str) -> Any:
    """Return what was booked there, or that nothing was: an answer may have been lost."""
    try:
        return ask("GET", url)
    except RefusedError:
        return byrd.NOT_DONE


@app.task(bind=True, base=byrd.SagaTask, **PATIENT)
def book_hotel(self: Task, service: str, city: str) -> dict[str, Any]:
    # The step's id is the same in each attempt: the service books once, however often it is asked.
    return ask("PUT", f"{service}/hotels/{self.request.id}", what=f"a room in {city}")


@book_hotel.confirm
def find_hotel(key: str, service: str, *_: Any) -> Any:
    return find(f"{service}/hotels/{key}")


@book_hotel.compensation
def cancel_hotel(booking: dict[str, Any], service: str, *_: Any) -> str:
    undoes = byrd.current_compensation()
    assert undoes is not None
    ask("DELETE", f"{service}/hotels/{undoes.step_id}")
    return f"given back: {booking['what']}"


@app.task(bind=True, base=byrd.SagaTask, **PATIENT)
def book_flight(self: Task, service: str, city: str) -> dict[str, Any]:
    return ask("PUT", f"{service}/flights/{self.request.id}", what=f"a seat to {city}")


@book_flight.confirm
def find_flight(key: str, service: str, *_: Any) -> Any:
    return find(f"{service}/flights/{key}")


@book_flight.compensation(max_retries=20, retry_backoff=0.5)  # after these, the run waits for a person: rollback_stuck
def cancel_flight(booking: dict[str, Any], service: str, *_: Any) -> str:
    undoes = byrd.current_compensation()
    assert undoes is not None
    ask("DELETE", f"{service}/flights/{undoes.step_id}")
    return f"given back: {booking['what']}"


# Once it is paid there is no way back: what follows is tried again instead.
@app.task(bind=True, base=byrd.SagaTask, pivot=True, compensation=None, **PATIENT)
def pay(self: Task, service: str, amount: int) -> dict[str, Any]:
    return ask("PUT", f"{service}/payments/{self.request.id}", what=f"{amount} paid", amount=amount)


@pay.confirm
def find_payment(key: str, service: str, *_: Any) -> Any:
    return find(f"{service}/payments/{key}")


# A mail server that is down is no reason to cancel a trip.
@app.task(bind=True, base=byrd.SagaTask, retriable=True, compensation=None)
def confirm_by_mail(self: Task, service: str, city: str) -> dict[str, Any]:
    return ask("PUT", f"{service}/mails/{self.request.id}", what=f"a mail about {city}")


@engine.workflow("trip.book", timeout=3600)
def book(service: str, city: str, amount: int) -> Any:
    return chain(
        book_hotel.si(service, city),
        book_flight.si(service, city),
        pay.si(service, amount),
        confirm_by_mail.si(service, city),
    )


if __name__ == "__main__":
    city, amount, *failing = [argument for argument in sys.argv[1:] if argument != "--fail"]
    with trip_service.running() as service:
        for name in failing:
            service.fail(name)
        run = book.submit(service.url, city, int(amount))
        print(f"the trip has {run.wait(timeout=60)}")  # unlike get(), wait() waits for the rollback too
        for step in run.steps():
            tries = f" in attempt {step.attempt}" if step.attempt > 1 else ""
            print(f"{step.no} {step.task} {step.status}{tries}")
        print(f"byrd show {run.id[:8]}")
        print(*service.ledger(), sep="\n")
