"""The commands that speak of the set-up: migrate, doctor, workers, relay."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import click
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from byrd import store
from byrd.cli.session import Session, command, console, print_json, say
from byrd.cli.shapes import checks_shape, worker_shape
from byrd.engine.doctor import Check, Level, examine, examine_database
from byrd.engine.words import ago, count, moment, span
from byrd.errors import ByrdError, ConfigurationError
from byrd.store import Store, WorkerRow
from byrd.worker import Sweeper
from byrd.worker.bootstep import settings_of

_LEVELS = {Level.OK: ("✔", "green"), Level.WARNING: ("!", "bold yellow"), Level.PROBLEM: ("✘", "bold red")}


def add_to(group: click.Group) -> None:
    """Add the commands to the group."""
    _add_migrate(group)
    _add_doctor(group)
    _add_workers(group)
    _add_relay(group)


# -- migrate ---------------------------------------------------------------------------------------


def _add_migrate(group: click.Group) -> None:
    @command(group, "migrate", short_help="Create or upgrade Byrd's tables.")
    @click.option("--sql", is_flag=True, help="Print the SQL instead, for those who apply it by hand.")
    def migrate(session: Session, *, sql: bool, as_json: bool) -> None:
        """Create or upgrade Byrd's tables in the database of BYRD_DATABASE_URL (or of the app)."""
        if sql:
            text = store.migration_sql()
            if as_json:
                print_json({"version": store.head_revision(), "sql": text})
            else:
                click.echo(text)
            return
        before, after = migrate_database(session.database_url())
        if as_json:
            print_json({"version": after, "was": before})
        elif before == after:
            say(f"Byrd's tables are at version {after} already.")
        elif before is None:
            say(f"Byrd's tables are made, at version {after}.")
        else:
            say(f"Byrd's tables are at version {after} now; they were at {before}.")


def migrate_database(url: Any) -> tuple[str | None, str]:
    """Migrate; return the versions before and after."""
    target = Store(url, patience=3.0)
    try:
        before = target.run(store.current_revision)
    finally:
        target.close()
    if before is not None and before > store.head_revision():
        raise ConfigurationError(
            f"Byrd's tables are at version {before}, newer than this Byrd's {store.head_revision()}; upgrade byrd here"
        )
    return before, store.migrate(url)


# -- doctor ----------------------------------------------------------------------------------------


def _add_doctor(group: click.Group) -> None:
    @command(group, "doctor", short_help="Say what is wrong with the set-up, and what to do.")
    @click.option(
        "--timeout",
        type=click.FloatRange(0.05, 60),
        default=1.5,
        show_default=True,
        help="Seconds for workers to answer.",
    )
    def doctor(session: Session, *, timeout: float, as_json: bool) -> None:
        """Look at the app, Postgres, the broker and the workers; say what is wrong, and what to do.

        The exit status is 1 if there is a problem.
        """
        logging.getLogger("byrd").setLevel(logging.ERROR)  # what is wrong is said below
        checks = _examine(session, timeout)
        if as_json:
            print_json(checks_shape(checks))
        else:
            _print_checks(checks)
        if any(check.level is Level.PROBLEM for check in checks):
            raise click.exceptions.Exit(1)


def _examine(session: Session, timeout: float) -> list[Check]:
    try:
        engine = session.engine(of_app=session.names_app)
    except ByrdError as exc:
        problem = Check("app", Level.PROBLEM, str(exc), "correct it; the app was left out of what follows")
        url = os.environ.get("BYRD_DATABASE_URL")
        return [problem, *(_database_alone(url) if url else [])]
    if not session.names_app:
        do = "name it to have its settings looked at too: `byrd -A shop.app doctor`"
        return [Check("app", Level.WARNING, "no app was named", do), *examine(engine, timeout=timeout)]
    return [Check("app", Level.OK, f"the app {engine.app.main!r} has an engine"), *examine(engine, timeout=timeout)]


def _database_alone(url: str) -> list[Check]:
    try:
        return examine_database(url)
    except Exception as exc:  # noqa: BLE001 - a URL that cannot be read is a finding too
        do = "correct BYRD_DATABASE_URL: postgresql://user:password@host/name"
        return [Check("database", Level.PROBLEM, f"BYRD_DATABASE_URL cannot be used ({type(exc).__name__})", do)]


def _print_checks(checks: Iterable[Check]) -> None:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    levels = []
    for check in checks:
        levels.append(check.level)
        symbol, style = _LEVELS[check.level]
        what = Text(check.what, style="" if check.level is Level.OK else style.removeprefix("bold "))
        if check.do:
            what.append("\n→ ", style="dim").append(check.do, style="dim" if check.level is Level.OK else "")
        table.add_row(Text(symbol, style=style), Text(check.name), what)
    console().print(table)
    problems, warnings = levels.count(Level.PROBLEM), levels.count(Level.WARNING)
    if problems:
        rest = f" and {count(warnings, 'warning')}" if warnings else ""
        say("\n", (f"{count(problems, 'problem')}{rest}.", "bold red"))
    elif warnings:
        say("\n", (f"No problem, {count(warnings, 'warning')}.", "yellow"))
    else:
        say("\n", ("All is well.", "green"))


# -- workers ---------------------------------------------------------------------------------------


def _add_workers(group: click.Group) -> None:
    @command(group, "workers", short_help="List the workers and their leases.")
    def workers(session: Session, *, as_json: bool) -> None:
        """List the workers, their leases, and what they run."""
        engine = session.engine(of_app=False)
        found = engine.workers()
        if as_json:
            print_json({"workers": [worker_shape(worker) for worker in found]})
            return
        if not found:
            say("No workers; `celery -A <app> worker` starts one.")
            return
        now = datetime.now(UTC)
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("worker", "lease", "running", "pool", "queues", "up", "version"):
            folded = name in ("worker", "queues")
            table.add_column(name, no_wrap=not folded, overflow="fold" if folded else "ellipsis")
        for worker in found:
            table.add_row(
                Text(worker.hostname),
                _lease(worker, now),
                f"{worker.running:,} of {worker.concurrency:,}" if worker.concurrency else f"{worker.running:,}",
                worker.pool,
                Text(", ".join(worker.queues)),
                span((now - worker.started_at).total_seconds()),
                worker.version,
            )
        console().print(table)


def _lease(worker: WorkerRow, now: datetime) -> Text:
    if not worker.alive:
        return Text(f"✘ ended {ago(worker.lease_until, now)}", style="red")
    if worker.stopping:
        return Text("● stopping", style="yellow")
    return Text(f"✔ until {moment(worker.lease_until, now)}", style="green")


# -- relay -----------------------------------------------------------------------------------------


def _add_relay(group: click.Group) -> None:
    @command(group, "relay", short_help="Run relay and recovery alone, without a worker.")
    def relay(session: Session, *, as_json: bool) -> None:
        """Publish ready steps and recover those of lost workers until Ctrl-C or SIGTERM.

        Each worker does this too; a relay of its own helps where all workers may be away for a time.
        """
        engine = session.engine()
        engine.check_live()
        logging.getLogger("byrd").setLevel(logging.INFO)
        logging.getLogger("byrd").addHandler(
            logging.StreamHandler() if as_json else RichHandler(console=console(stderr=True), show_path=False)
        )
        sweeper = Sweeper(engine.runtime, settings_of(engine.app))
        told = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: told.set())
        sweeper.start()
        if as_json:
            print_json({"event": "started"}, lines=True)
        else:
            say("Relay and recovery run; Ctrl-C ends them.")
        told.wait()
        sweeper.stop()
        engine.close()
        if as_json:
            print_json({"event": "stopped"}, lines=True)
        else:
            say("Stopped.")
