"""The commands that speak of runs: submit, runs, show, why, cancel, pause, resume, rollback, skip, retry, ..."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import click
from rich.live import Live
from rich.table import Table
from rich.text import Text

from byrd.cli.bulk import filtered, wish_of
from byrd.cli.bulk import order as order_bulk
from byrd.cli.draw import drawing, status_text
from byrd.cli.session import Session, command, console, print_json, say
from byrd.cli.shapes import run_shape, snapshot_shape
from byrd.engine import Byrd, Run
from byrd.engine.why_schedule import explain_schedule
from byrd.engine.words import error_text, moment, shortened, span
from byrd.errors import ArgumentError, RunNotFoundError, UnknownWorkflowError
from byrd.model import RunStatus
from byrd.store import reading
from byrd.store.insight import Items, Snapshot, Tally, items_of, snapshot, tallies

#: How often `--watch` and `--wait` look.
_LOOK_SECONDS = 0.5
#: The engine waits this long for Postgres when it submits; reading gives up sooner.
_SUBMIT_PATIENCE = 10.0


def add_to(group: click.Group) -> None:
    """Add the commands to the group."""
    _add_submit(group)
    _add_list(group)
    _add_show(group)
    _add_why(group)
    _add_operations(group)


# -- submit ----------------------------------------------------------------------------------------


def _add_submit(group: click.Group) -> None:
    @command(group, "submit", context_settings={"ignore_unknown_options": True}, short_help="Start a workflow.")
    @click.argument("name")
    @click.argument("args", nargs=-1)
    @click.option("--kwarg", "-k", "pairs", multiple=True, metavar="NAME=JSON", help="A keyword argument; repeatable.")
    @click.option("--key", help="A second submit with the same key finds the first run.")
    @click.option("--timeout", type=float, help="Seconds until the run is stopped and failed.")
    @click.option("--wait", is_flag=True, help="Wait for the end, and print the result.")
    def submit(
        session: Session,
        *,
        name: str,
        args: tuple[str, ...],
        pairs: tuple[str, ...],
        key: str | None,
        timeout: float | None,
        wait: bool,
        as_json: bool,
    ) -> None:
        """Submit the workflow (or the task) NAME with ARGS, each a JSON value.

        For example: byrd submit shop.order 42 '"express"' --kwarg gift=true --key order-42 --wait
        """
        engine = session.engine(patience=_SUBMIT_PATIENCE)
        values = [json_value(text) for text in args]
        named = dict(_pair(text) for text in pairs)
        run = _submit(engine, name, values, named, key=key, timeout=timeout)
        if wait:
            _finish(engine, run, as_json=as_json)
        elif as_json:
            print_json({"run": run.id, "workflow": run.workflow, "status": str(run.status)})
        else:
            say("Submitted ", (run.id, "bold"), f"; `byrd show {run.id[:8]} --watch` follows it.")


def _submit(engine: Byrd, name: str, args: list[Any], kwargs: dict[str, Any], **options: Any) -> Run:
    try:
        engine.workflow_named(name)
    except UnknownWorkflowError:
        if name not in engine.app.tasks:
            raise
        return engine.submit(engine.app.tasks[name].s(*args, **kwargs), **options)
    clash = kwargs.keys() & {"key", "timeout", "connection", "canvas"}
    if clash:
        raise ArgumentError(
            f"--kwarg {min(clash)}: the engine itself uses this name; give --{min(clash)}, or rename it"
        )
    return engine.submit(name, *args, **options, **kwargs)


def json_value(text: str) -> Any:
    """Return a value that was given as JSON; raise :class:`ArgumentError` for what is none."""
    try:
        return json.loads(text)
    except ValueError:
        quoted = json.dumps(text, ensure_ascii=False)
        raise ArgumentError(f"the argument {text} is not JSON; if it is a text, quote it: '{quoted}'") from None


def _pair(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ArgumentError(f"--kwarg {text}: write it as name=value, the value in JSON")
    return name, json_value(value)


def _finish(engine: Byrd, run: Run, *, as_json: bool) -> None:
    """Wait for the run's end and print its result; the exit status says whether it succeeded."""
    try:
        _wait(engine, run, quiet=as_json)
    except KeyboardInterrupt:
        say("The run goes on without you: ", (f"byrd show {run.id[:8]} --watch", "bold"))
        raise click.exceptions.Exit(130) from None
    _, status, result, error, run_status, _ = engine.runtime.store.run(reading.outcome, run.id)
    succeeded = run_status == RunStatus.SUCCEEDED
    if as_json:
        shape = _run_with_tally(engine, run.id)
        print_json({**shape, "run": run.id, "result": json.loads(result) if result is not None else None})
    elif succeeded or status == "succeeded":
        console().print_json(result or "null", highlight=console().is_terminal)
    if not succeeded and not as_json:
        words = f" {error_text(error)}" if error else ""
        console(stderr=True).print(Text.assemble(status_text(run_status), ":", words), soft_wrap=True)
    if not succeeded:
        raise click.exceptions.Exit(1)


def _wait(engine: Byrd, run: Run, *, quiet: bool) -> None:
    out = console(stderr=True)
    if quiet or not out.is_terminal:
        run.wait()
        return
    with out.status("") as spinner:
        while not _at_rest(run.status):
            tally = engine.runtime.store.run(tallies, [run.id]).get(run.id, Tally(0, 0, 0, 0))
            spinner.update(f"{run.id[:8]}: {tally.done:,} of {tally.total:,} steps done")
            time.sleep(_LOOK_SECONDS / 2)


def _at_rest(status: RunStatus) -> bool:
    return status.final or status is RunStatus.ROLLBACK_STUCK


# -- runs ------------------------------------------------------------------------------------------


def _add_list(group: click.Group) -> None:
    @command(group, "runs", short_help="List runs, the newest first.")
    @click.option("--workflow", "-w", help="Only runs of this workflow.")
    @click.option(
        "--status", "-s", "statuses", multiple=True, type=click.Choice([status.value for status in RunStatus])
    )
    @click.option("--limit", "-n", type=click.IntRange(1, 100_000), default=20, show_default=True)
    def runs(session: Session, *, workflow: str | None, statuses: tuple[str, ...], limit: int, as_json: bool) -> None:
        """List runs, the newest first."""
        engine = session.engine(of_app=False)
        engine.check_live()
        store = engine.runtime.store
        found = store.run(reading.list_runs, workflow=workflow, statuses=statuses or None, limit=limit)
        counts = store.run(tallies, [run.id for run in found])
        items = store.run(items_of, [run.id for run in found])
        now = datetime.now(UTC)
        if as_json:
            print_json({"runs": [run_shape(run, counts.get(run.id), items.get(run.id), now=now) for run in found]})
            return
        if not found:
            say("No runs", (" like that" if workflow or statuses else " yet; `byrd submit WORKFLOW` starts one"), ".")
            return
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("run", no_wrap=True)
        # A long title gives way to the facts, which are of no use when they are cut.
        table.add_column("workflow", overflow="ellipsis", no_wrap=True, max_width=max(12, console().width - 75))
        table.add_column("status", no_wrap=True)
        table.add_column("steps", justify="right", no_wrap=True)
        if items:
            table.add_column("items", justify="right", no_wrap=True)
        table.add_column("submitted", no_wrap=True)
        table.add_column("took", justify="right", no_wrap=True)
        keyed = any(run.key for run in found)
        if keyed:
            table.add_column("key", overflow="ellipsis", no_wrap=True)
        for run in found:
            tally = counts.get(run.id, Tally(0, 0, 0, 0))
            name = Text(run.workflow) if run.workflow else Text(run.title, style="dim")
            took = span(((run.finished_at or now) - run.created_at).total_seconds())
            steps = f"{tally.total:,}" if tally.done == tally.total else f"{tally.done:,}/{tally.total:,}"
            cells: list[str | Text] = [
                run.id[:8],
                name,
                status_text(run.status),
                steps,
                *([_items_text(items.get(run.id))] if items else []),
                moment(run.created_at, now),
                took,
            ]
            cells += [Text(run.key or "")] if keyed else []
            table.add_row(*cells)
        console().print(table)


def _items_text(items: Items | None) -> Text:
    """Return how far a run's checkpoints are."""
    if items is None:
        return Text("")
    return Text(f"{items.completed:,}").append(f", {items.failed:,} failed" if items.failed else "", style="yellow")


# -- show and why ----------------------------------------------------------------------------------


def _add_show(group: click.Group) -> None:
    @command(group, "show", short_help="Draw a run with its steps.")
    @click.argument("run_id", metavar="RUN")
    @click.option("--watch", "-w", is_flag=True, help="Follow it until its end.")
    @click.option("--all", "every", is_flag=True, help="Each step of large groups, and errbacks that were not called.")
    def show(session: Session, *, run_id: str, watch: bool, every: bool, as_json: bool) -> None:
        """Draw the RUN (an id, or how it begins) with its steps as a tree."""
        engine = session.engine(of_app=False)
        run = engine.get(run_id)
        if as_json:
            _show_json(engine, run, watch=watch)
            return
        found = engine.runtime.store.run(snapshot, run.id, every=every)
        if watch and not _at_rest(RunStatus(found.run.status)):
            found = _watch(engine, found, every=every)
        console().print(drawing(found, every=every))


def _watch(engine: Byrd, found: Snapshot, *, every: bool) -> Snapshot:
    """Draw the run again and again until its end; return how it was at last."""
    out = console()
    if not out.is_terminal:
        engine.get(found.run.id).wait()
        return engine.runtime.store.run(snapshot, found.run.id, every=every)
    try:
        with Live(console=out, auto_refresh=False, transient=True) as live:
            while not _at_rest(RunStatus(found.run.status)):
                live.update(drawing(found, every=every), refresh=True)
                time.sleep(_LOOK_SECONDS)
                found = engine.runtime.store.run(snapshot, found.run.id, every=every)
    except KeyboardInterrupt:
        pass  # what was seen last stays on the screen
    return found


def _show_json(engine: Byrd, run: Run, *, watch: bool) -> None:
    """Print the run; with ``watch`` one line for each change, until its end."""
    store, last = engine.runtime.store, ""
    while True:
        found = store.run(snapshot, run.id)
        shape = snapshot_shape(found, store.run(tallies, [run.id]).get(run.id))
        seen = repr([found.run, found.steps, found.checkpoints])
        if seen != last:
            print_json(shape, lines=watch)
        if not watch or _at_rest(RunStatus(found.run.status)):
            return
        last = seen
        time.sleep(_LOOK_SECONDS)


def _run_with_tally(engine: Byrd, run_id: str) -> dict[str, Any]:
    store = engine.runtime.store
    return run_shape(store.run(reading.get, run_id), store.run(tallies, [run_id]).get(run_id))


def _add_why(group: click.Group) -> None:
    @command(group, "why", short_help="Say what a run waits for, or how it ended.")
    @click.argument("name", metavar="RUN|SCHEDULE")
    def why(session: Session, *, name: str, as_json: bool) -> None:
        """Say in a sentence each what a run waits for, or how it ended; or why a schedule submits none."""
        engine = session.engine(of_app=False)
        shape: dict[str, Any]
        try:
            run = engine.get(name)
        except RunNotFoundError:
            found = explain_schedule(engine, name)
            if found is None:
                raise
            reasons, shape = found, {"schedule": name}
        else:
            reasons = run.why()
            shape = {"run": run.id, "status": str(run.status)}
        if as_json:
            print_json({**shape, "reasons": reasons})
            return
        for reason in reasons:
            say("• " if len(reasons) > 1 else "", reason)


# -- operations ------------------------------------------------------------------------------------


def _add_operations(group: click.Group) -> None:
    @command(group, "cancel", short_help="Stop a run, or many.")
    @filtered
    @click.option("--compensate", is_flag=True, help="Then undo its completed saga steps.")
    @click.option("--terminate", is_flag=True, help="End what does not stop by itself in the grace time.")
    @click.option("--grace", type=float, metavar="SECONDS", help="The grace time of --terminate; 5 unless given.")
    def cancel(session: Session, *, run_ids: tuple[str, ...], as_json: bool, **options: Any) -> None:
        """Stop each RUN: what has not started never will, what runs stops at its next checkpoint.

        Without RUN, all runs that match a filter, by a job of its own.
        """
        _operate_many(session, "cancel", run_ids, options, _after_cancel, as_json=as_json)

    @command(group, "pause", short_help="Let nothing more of a run start, or of many.")
    @filtered
    def pause(session: Session, *, run_ids: tuple[str, ...], as_json: bool, **options: Any) -> None:
        """Pause each RUN: nothing more of it starts, checkpointed steps stop at their next checkpoint.

        Without RUN, all runs that match a filter, by a job of its own.
        """
        _operate_many(session, "pause", run_ids, options, _after_pause, as_json=as_json)

    @command(group, "resume", short_help="Let a paused run go on, or many.")
    @filtered
    def resume(session: Session, *, run_ids: tuple[str, ...], as_json: bool, **options: Any) -> None:
        """Let each paused RUN go on.

        Without RUN, all runs that match a filter, by a job of its own.
        """
        _operate_many(session, "resume", run_ids, options, _after_resume, as_json=as_json)

    _add_rollbacks(group)

    @command(group, "retry", short_help="Try again what did not succeed.")
    @filtered
    def retry(session: Session, *, run_ids: tuple[str, ...], as_json: bool, **options: Any) -> None:
        """Try each failed or cancelled RUN again, keeping what succeeded; or the compensations that are stuck.

        Without RUN, all runs that match a filter, by a job of its own: failed ones, unless --status says otherwise.
        """
        _operate_many(session, "retry", run_ids, options, _after_resume, as_json=as_json)


def _add_rollbacks(group: click.Group) -> None:
    @command(group, "rollback", short_help="Undo what a run did.")
    @click.argument("run_ids", metavar="RUN...", nargs=-1, required=True)
    @click.option("--reason", help="Why, for the history, and for the compensations.")
    def rollback(session: Session, *, run_ids: tuple[str, ...], reason: str | None, as_json: bool) -> None:
        """Undo the completed saga steps of each RUN, which has ended or is paused; it ends as cancelled."""
        _operate(session, run_ids, lambda run, by: run.rollback(reason=reason, by=by), _after_undo, as_json=as_json)

    @command(group, "skip", short_help="Let a compensation be.")
    @click.argument("run_id", metavar="RUN")
    @click.argument("step", type=int)
    @click.option("--reason", required=True, help="Why what it should undo stays as it is, for the history.")
    def skip(session: Session, *, run_id: str, step: int, reason: str, as_json: bool) -> None:
        """Let the compensation that is STEP of RUN be: what it should undo stays, and the rollback goes on."""
        _operate(session, [run_id], lambda run, by: run.skip(step, reason=reason, by=by), _after_undo, as_json=as_json)

    @command(group, "done-by-hand", short_help="Say that you have undone a step.")
    @click.argument("run_id", metavar="RUN")
    @click.argument("step", type=int)
    @click.option("--note", required=True, help="What was done, for the history.")
    def done_by_hand(session: Session, *, run_id: str, step: int, note: str, as_json: bool) -> None:
        """Record that somebody has done what the compensation that is STEP of RUN should do; the rollback goes on."""
        _operate(
            session, [run_id], lambda run, by: run.done_by_hand(step, note=note, by=by), _after_undo, as_json=as_json
        )


def _operate_many(
    session: Session,
    action: str,
    run_ids: tuple[str, ...],
    options: dict[str, Any],
    tell: Callable[[str, RunStatus], str],
    *,
    as_json: bool,
) -> None:
    """Do something to runs that are named, or to those that match a filter."""
    wish = wish_of(options, run_ids, action)
    if wish is None:
        _operate(session, run_ids, lambda run, by: getattr(run, action)(by=by, **options), tell, as_json=as_json)
        return
    finish = partial(_finish, as_json=as_json)
    engine = session.engine(patience=_SUBMIT_PATIENCE)
    order_bulk(engine, action, wish, by=operator(), finish=finish, as_json=as_json, options=options)


def _operate(
    session: Session,
    run_ids: Sequence[str],
    act: Callable[[Run, str], None],
    tell: Callable[[str, RunStatus], str],
    *,
    as_json: bool,
) -> None:
    engine = session.engine()
    found = [engine.get(run_id) for run_id in run_ids]  # all of them, before anything happens to one
    done = []
    for run in found:
        act(run, operator())
        status = run.status
        message = tell(run.id[:8], status)
        done.append({"run": run.id, "status": str(status), "message": message})
        if not as_json:
            say(message)
    if as_json:
        print_json({"runs": done})


def operator() -> str:
    """Return who is at this command line, for the run's history."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id often has no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "somebody"
    return f"{user}@{socket.gethostname()}"


def _after_cancel(run: str, status: RunStatus) -> str:
    if status is RunStatus.CANCELLED:
        return f"Run {run} is cancelled; `byrd retry {run}` would start again what did not succeed."
    if status is RunStatus.CANCELLING:
        return f"Run {run} is being cancelled and waits for its running steps; `byrd show {run} --watch` follows it."
    if status is RunStatus.COMPENSATING:
        return f"Run {run} is stopped and rolls back now; `byrd show {run} --watch` follows it."
    return f"Run {run} is {status}."


def _after_pause(run: str, status: RunStatus) -> str:
    return f"Run {run} is {status}; `byrd resume {run}` lets it go on."


def _after_undo(run: str, status: RunStatus) -> str:
    if status is RunStatus.ROLLBACK_STUCK:
        return f"Run {run} is still stuck, at another compensation; `byrd why {run}` says at which."
    if status.final:
        return f"Run {run} is rolled back: {status}."
    return f"Run {run} is {status}; `byrd show {run} --watch` follows it."


def _after_resume(run: str, status: RunStatus) -> str:
    return f"Run {run} is {shortened(status.replace('_', ' '), 40)} again; `byrd show {run} --watch` follows it."
