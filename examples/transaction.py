"""An order and its run in one transaction: both exist, or neither; and one run per order, however often it is asked."""

import os
from typing import Any

from celery import Celery, chain
from sqlalchemy import Connection, create_engine, text

import byrd
from byrd.store import normalise_url

app = Celery("transaction")
engine = byrd.Byrd(app)


@app.task
def reserve(order_id: int) -> int:
    return order_id


@app.task
def ship(order_id: int) -> str:
    return f"order {order_id} is on its way"


@engine.workflow("transaction.fulfil")
def fulfil(order_id: int) -> Any:
    return chain(reserve.s(order_id), ship.s())


def place_order(conn: Connection, customer: str) -> int:
    """Write an order, and submit its run in the same transaction."""
    order_id: int = conn.execute(
        text("INSERT INTO orders (customer) VALUES (:customer) RETURNING id"), {"customer": customer}
    ).scalar_one()
    fulfil.submit(order_id, connection=conn, key=f"order-{order_id}")
    return order_id


if __name__ == "__main__":
    database = create_engine(normalise_url(os.environ["BYRD_DATABASE_URL"]))  # the application's own: the same database
    with database.begin() as conn:
        conn.execute(text("CREATE TABLE IF NOT EXISTS orders (id serial PRIMARY KEY, customer text NOT NULL)"))

    with database.begin() as conn:
        ada = place_order(conn, "Ada")
    run = fulfil.submit(ada, key=f"order-{ada}")  # a request that came twice, say: this is the run of the transaction
    print(run.get(timeout=60))

    runs = len(engine.list(workflow=fulfil.name))
    with database.connect() as conn:
        place_order(conn, "Charles")
        conn.rollback()
    print(f"rolled back: {len(engine.list(workflow=fulfil.name)) - runs} runs more than before")
