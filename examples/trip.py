"""A saga: a hotel, a flight, a payment. When the payment is refused, the flight and the hotel are given back."""

import sys
from typing import Any

from celery import Celery, chain

import byrd

app = Celery("trip")
engine = byrd.Byrd(app)


@app.task(base=byrd.SagaTask)
def book_hotel(city: str) -> str:
    return f"hotel {city}, room 12"


@book_hotel.compensation
def cancel_hotel(room: str, city: str) -> str:
    return f"free again in {city}: {room}"


@app.task(base=byrd.SagaTask)
def book_flight(city: str) -> str:
    return f"flight to {city}, seat 4A"


@book_flight.compensation(max_retries=20)  # after these retries, the run waits for a person: `rollback_stuck`
def cancel_flight(seat: str, city: str) -> str:
    return f"free again to {city}: {seat}"


@app.task
def pay(amount: int) -> str:
    if amount > 1000:
        raise ValueError(f"the bank refuses to pay {amount}")
    return f"paid {amount}"


@engine.workflow("trip.book", timeout=3600)
def book(city: str, amount: int) -> Any:
    return chain(book_hotel.si(city), book_flight.si(city), pay.si(amount))


if __name__ == "__main__":
    run = book.submit(sys.argv[1], int(sys.argv[2]))
    print(f"the trip has {run.wait(timeout=60)}")  # unlike get(), wait() waits for the rollback too
    for step in run.steps():
        print(f"{step.no} {step.task} {step.status} {step.result or ''}".rstrip())
    print(repr(run.get(propagate=False)))
