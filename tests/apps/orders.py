"""A function with pydantic arguments.

Without ``from __future__ import annotations``: Celery 5.5 and 5.6 read annotations as they stand.
"""

from pydantic import BaseModel


class Order(BaseModel):
    """A pydantic argument."""

    sku: str
    amount: int = 1


def order(given: Order) -> Order:
    """Get and give models."""
    return Order(sku=given.sku.upper(), amount=given.amount + 1)
