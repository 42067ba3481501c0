"""An order: all prices at once, their total, the tax, the payment."""

from typing import Any

from celery import Celery, chain, chord

import byrd

app = Celery("shop")
engine = byrd.Byrd(app)  # the one line: from now on every canvas of this app can be a run

PRICES = {"tea": 4.50, "mug": 9.00, "spoon": 2.25}


@app.task
def price(sku: str) -> float:
    return PRICES[sku]


@app.task
def total(prices: list[float]) -> float:
    return sum(prices)


@app.task
def add_tax(net: float, rate: float) -> float:
    return round(net * (1 + rate), 2)


@app.task(autoretry_for=(ConnectionError,), retry_backoff=True, max_retries=10)
def pay(amount: float, order_id: int) -> str:
    return f"order {order_id} is paid: {amount:.2f}"


@engine.workflow("shop.order")
def order(order_id: int, skus: list[str]) -> Any:
    return chain(chord([price.s(sku) for sku in skus], total.s()), add_tax.s(0.2), pay.s(order_id))


if __name__ == "__main__":
    run = order.submit(42, ["tea", "mug"], key="order-42")  # submitted again, this key gives the same run
    print(run.get(timeout=60))
