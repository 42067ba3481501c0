"""An expense that a person approves: the run waits for the signal, and holds no worker meanwhile.

python approval.py 900                           # prints the run, and waits
byrd waiting --of finance                        # in another terminal: what awaits finance
byrd signal RUN approval '{"ok": true, "by": "ann"}'
"""

import sys
from typing import Any

from celery import Celery, chain, group

import byrd

app = Celery("approval")
engine = byrd.Byrd(app)

NOBODY = {"ok": False, "by": "nobody"}


@app.task
def check(amount: float) -> float:
    return round(amount, 2)


@app.task
def decide(found: list[Any]) -> str:
    amount, answer = found
    return f"{amount:.2f} {'paid' if answer['ok'] else 'refused'}, decided by {answer['by']}"


@engine.workflow("approval.expense")
def expense(amount: float, patience: float = 7 * 24 * 3600) -> Any:
    approval = byrd.wait_for("approval", of="finance", timeout=patience, default=NOBODY)
    return chain(group(check.s(amount), approval), decide.s())


if __name__ == "__main__":
    run = expense.submit(*map(float, sys.argv[1:]))
    print(f'byrd signal {run.id[:8]} approval \'{{"ok": true, "by": "you"}}\'', flush=True)
    print(run.get())
