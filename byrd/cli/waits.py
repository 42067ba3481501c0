"""The commands that speak of signals: signal, waiting."""

from __future__ import annotations

from datetime import UTC, datetime

import click
from rich.table import Table
from rich.text import Text

from byrd.cli.runs import json_value, operator
from byrd.cli.session import Session, command, console, print_json, say
from byrd.cli.shapes import awaited_shape
from byrd.engine.words import ago, moment, shortened, since
from byrd.store.waits import Awaited


def add_to(group: click.Group) -> None:
    """Add the commands to the group."""
    _add_signal(group)
    _add_waiting(group)


def _add_signal(group: click.Group) -> None:
    @command(group, "signal", short_help="Send a run a signal.", context_settings={"ignore_unknown_options": True})
    @click.argument("run_id", metavar="RUN")
    @click.argument("name")
    @click.argument("payload", metavar="[JSON]", default="null")
    def signal(session: Session, *, run_id: str, name: str, payload: str, as_json: bool) -> None:
        """Send the RUN the signal NAME; JSON becomes the value of the step that waits for it.

        For example: byrd signal 7682 approval '{"by": "ann", "ok": true}'
        """
        run = session.engine().get(run_id)
        run.signal(name, json_value(payload), by=operator())
        if as_json:
            print_json({"run": run.id, "signal": name, "status": str(run.status)})
        else:
            say(f"Signal {name} is sent to run {run.id[:8]}; `byrd show {run.id[:8]} --watch` follows it.")


def _add_waiting(group: click.Group) -> None:
    @command(group, "waiting", short_help="List what waits for a signal.")
    @click.option("--signal", "-s", "name", help="Only what waits for this signal; 'approval:*' for all that begin so.")
    @click.option("--of", help="Only what this person, role or system is to answer.")
    @click.option("--workflow", "-w", help="Only runs of this workflow.")
    @click.option("--limit", "-n", type=click.IntRange(1, 100_000), default=20, show_default=True)
    def waiting(
        session: Session, *, name: str | None, of: str | None, workflow: str | None, limit: int, as_json: bool
    ) -> None:
        """List the steps that wait for a signal, those that have waited longest first."""
        found = session.engine(of_app=False).waiting(signal=name, workflow=workflow, of=of, limit=limit)
        if as_json:
            print_json({"waiting": [awaited_shape(step) for step in found]})
        elif not found:
            say("Nothing waits for a signal", " like that" if name or of or workflow else "", ".")
        else:
            now = datetime.now(UTC)
            table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
            named = any(step.of is not None for step in found)
            for title in ("run", "workflow", "step", "signal", *(["of"] if named else []), "since", "until", "then"):
                # In a narrow terminal the others are folded, and what names the step stays whole.
                table.add_column(title, no_wrap=title in ("run", "step", "signal"), overflow="fold")
            for step in found:
                table.add_row(*_cells(step, now, named=named))
            console().print(table)


def _cells(step: Awaited, now: datetime, *, named: bool) -> list[str | Text]:
    workflow = Text(step.workflow) if step.workflow else Text(shortened(step.title, 40), style="dim")
    until = f"{moment(step.until, now)} ({ago(step.until, now)})" if step.until else "-"
    then = "" if step.until is None else "fails" if step.default is None else shortened(step.default, 30)
    if step.run_status == "paused":
        until += ", paused"
    whom = [Text(step.of or "-")] if named else []
    return [
        step.run_id[:8], workflow, str(step.step_no), Text(step.signal, style="bold"), *whom, since(step.since, now),
        until, Text(then),
    ]  # fmt: skip
