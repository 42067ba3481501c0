"""`byrd limits`: what is limited, who waits, and how to set it otherwise than the code declares it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from byrd.cli.runs import operator
from byrd.cli.session import Session, command, console, print_json, say
from byrd.cli.shapes import limit_shape
from byrd.engine.words import ago, moment, shortened
from byrd.errors import LimitError
from byrd.store.limits import KEEP, LimitRow

_ACTIONS = ("list", "set", "reset", "park", "unpark")


def add_to(group: click.Group) -> None:
    """Add the command to the group."""

    @command(group, "limits", short_help="List limits, and change them at run time.")
    @click.argument("action", type=click.Choice(_ACTIONS), default="list")
    @click.argument("name", required=False)
    @click.argument("key", default="", metavar="[KEY]")
    @click.option("--rate", metavar="RATE", help="set: such as 10/s, 100/m, 5/h; none takes it away.")
    @click.option("--burst", type=int, metavar="N", help="set: so many may come at once after a quiet time.")
    @click.option("--concurrency", metavar="N", help="set: at most so many at once; none takes it away, 0 stops all.")
    @click.option("--for", "seconds", type=float, metavar="SECONDS", help="park: for so long.")
    @click.option("--limit", "-n", type=click.IntRange(1, 100_000), default=50, show_default=True)
    def limits(
        session: Session, *, action: str, name: str | None, key: str, limit: int, as_json: bool, **options: Any
    ) -> None:
        """List the limits with their keys that are in use, or change one for all workers, at once.

        \b
        byrd limits                                   what there is, who runs, who waits
        byrd limits set github --rate 5/s             until it is reset
        byrd limits set github --concurrency 0        nothing more starts
        byrd limits reset github                      as the code declares it
        byrd limits park github acme --for 60         nothing of this key starts for a minute
        byrd limits unpark github acme
        """
        _check_use(action, name, key, options)
        if action == "list":
            _show(session, name, limit, as_json=as_json)
            return
        found = session.engine(of_app=session.names_app).limits
        if action == "set":
            row = found.set(name or "", **_changes(options), by=operator())
        elif action == "reset":
            row = found.reset(name or "")
        else:
            if action == "park":
                found.park(name or "", key, seconds=options["seconds"])
            else:
                found.unpark(name or "", key)
            [row] = [each for each in found.list(name, limit=100_000) if each.key == key] or found.list(name, limit=1)
        if as_json:
            print_json(limit_shape(row))
        else:
            say(_told(action, name or "", key, row))


def _check_use(action: str, name: str | None, key: str, options: dict[str, Any]) -> None:
    allowed = {"set": {"rate", "burst", "concurrency"}, "park": {"seconds"}}.get(action, set())
    names = {"seconds": "--for"}
    if unknown := [names.get(k, f"--{k}") for k, value in options.items() if value is not None and k not in allowed]:
        raise click.UsageError(f"`byrd limits {action}` takes no {unknown[0]}")
    if action != "list" and not name:
        raise click.UsageError(f"which limit? `byrd limits {action} NAME`")
    if key and action not in ("park", "unpark"):
        raise click.UsageError(f"`byrd limits {action}` takes no key: a limit is the same for each of its keys")
    if action == "park" and options["seconds"] is None:
        raise click.UsageError("for how long? `byrd limits park NAME KEY --for SECONDS`")


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    rate, burst, concurrency = options["rate"], options["burst"], options["concurrency"]
    return {
        "rate": KEEP if rate is None else None if rate == "none" else rate,
        "burst": KEEP if burst is None else burst,
        "concurrency": KEEP if concurrency is None else _number(concurrency),
    }


def _number(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise LimitError(f"concurrency={text!r} is neither a whole number nor none") from None


def _told(action: str, name: str, key: str, row: LimitRow) -> str:
    if action == "park":
        return f"Nothing of {key!r} under the limit {name} starts until {moment(row.parked_until)}."
    if action == "unpark":
        return f"The steps of {key!r} under the limit {name} start again."
    if action == "reset":
        return f"The limit {name} is as the code declares it: {_limit(row)}."
    return f"The limit {name} is now {_limit(row)}, for all workers; `byrd limits reset {name}` undoes it."


def _limit(row: LimitRow) -> str:
    burst = f", burst {row.burst}" if row.rate and row.burst > 1 else ""
    most = f"at most {row.concurrency:,} at once" if row.concurrency is not None else ""
    return ", ".join(filter(None, [f"{row.rate}{burst}" if row.rate else "", most])) or "none at all"


def _show(session: Session, name: str | None, limit: int, *, as_json: bool) -> None:
    rows = session.engine(of_app=False).limits.list(name, limit=limit)
    if as_json:
        print_json({"limits": [limit_shape(row) for row in rows]})
    elif not rows:
        say("No task that a worker has declared is limited", " by that name" if name else "", ".")
    else:
        now = datetime.now(UTC)
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for title in ("limit", "key", "rate", "at once", "running", "waiting", "until", "set by"):
            # In a narrow terminal the others are folded.
            table.add_column(title, no_wrap=title in ("limit", "key", "running", "waiting"), overflow="fold")
        for row in rows:
            table.add_row(*_cells(row, now))
        console().print(table)


def _cells(row: LimitRow, now: datetime) -> list[str | Text]:
    burst = f" (burst {row.burst})" if row.rate and row.burst > 1 else ""
    until = f"{moment(row.until, now)} ({ago(row.until, now)})" if row.until else "-"
    if row.parked_until is not None:
        until += ", parked"
    key = Text("-", style="dim") if not row.key else Text(shortened(row.key, 40))
    return [
        Text(row.name, style="bold"), key, f"{row.rate}{burst}" if row.rate else "-",
        "-" if row.concurrency is None else f"{row.concurrency:,}", f"{row.running:,}", f"{row.waiting:,}", until,
        Text(row.set_by or ("-" if row.set_at is None else "?"), style="dim"),
    ]  # fmt: skip
