"""A long import that resumes where it was: each line ends up in the table exactly once, whatever is killed."""

import csv
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import Connection, text

import byrd

app = Celery("imports")
engine = byrd.Byrd(app)


def lines_after(path: str, cursor: int | None) -> Iterator[tuple[int, str]]:
    """The lines of a file behind a byte offset, each with the offset at its end."""
    with Path(path).open("rb") as file:
        file.seek(cursor or 0)
        while line := file.readline():
            yield file.tell(), line.decode().rstrip("\n")


def parse(line: str) -> dict[str, Any]:
    """Read one line; an exception fails this line alone."""
    [row] = csv.reader([line])
    name, email = row
    if "@" not in email:
        raise ValueError(f"{email!r} is not an e-mail address")
    return {"name": name, "email": email}


def insert(conn: Connection, outcomes: list[byrd.Outcome]) -> None:
    """Write one batch, in the transaction that saves the checkpoint."""
    conn.execute(
        text("INSERT INTO customers (name, email) VALUES (:name, :email)"), [outcome.value for outcome in outcomes]
    )


@app.task(bind=True, base=byrd.CheckpointTask)
def import_customers(self: byrd.CheckpointTask, path: str) -> dict[str, Any]:
    with self.transaction() as conn:  # one more transaction that only the attempt which owns the step can commit
        conn.execute(text("CREATE TABLE IF NOT EXISTS customers (name text NOT NULL, email text NOT NULL)"))
    done = self.iterate(partial(lines_after, path), parse, save=insert, batch_size=100, item_retries=1)
    refused = [{"line": line, "error": error} for line, error in self.quarantined()]
    return {"imported": done.completed, "refused": refused}


if __name__ == "__main__":
    run = engine.submit(import_customers.s(str(Path(sys.argv[1]).resolve())))
    result = run.get(timeout=600)
    print(f"{result['imported']} customers imported")
    for refused in result["refused"]:
        print(f"refused: {refused['line']} ({refused['error']})")
