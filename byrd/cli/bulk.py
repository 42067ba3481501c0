"""`byrd cancel`, `retry`, `pause` and `resume` without RUN: a job that goes through the runs which match a filter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import click

from byrd.cli.session import print_json, say
from byrd.engine import Byrd, Run
from byrd.engine.words import count
from byrd.model import RunStatus

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
#: What each option of :func:`filtered` is called on the command line.
_OPTIONS = {
    "workflow": "--workflow", "status": "--status", "older_than": "--older-than", "newer_than": "--newer-than",
    "error": "--error", "everything": "--all", "dry_run": "--dry-run", "wait": "--wait",
}  # fmt: skip


class Wish(NamedTuple):
    """What was asked for, beside runs by their ids."""

    given: Mapping[str, Any]

    @property
    def filter(self) -> dict[str, Any]:
        """The filter, as the engine takes it."""
        found = {name: value for name, value in self.given.items() if name not in ("dry_run", "wait")}
        return {**found, "status": found["status"] or None}

    @property
    def dry_run(self) -> bool:
        """Count only."""
        return bool(self.given["dry_run"])

    @property
    def wait(self) -> bool:
        """Wait for the job."""
        return bool(self.given["wait"])

    @property
    def options(self) -> list[str]:
        """The options that were given."""
        return [_OPTIONS[name] for name, value in self.given.items() if value not in (None, (), False)]


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read a time such as ``90s``, ``30m``, ``2h`` or ``7d``."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no time: write 90s, 30m, 2h, 7d or 4w", ctx, param)
    return float(found[1]) * _UNITS[found[2]]


def filtered(function: F) -> F:
    """Let a command take runs, or a filter in their place."""
    names = [status.value for status in RunStatus]
    for option in reversed([
        click.option("--workflow", "-w", help="Of this workflow."),
        click.option("--status", "-s", multiple=True, type=click.Choice(names), help="Of this status; repeatable."),
        click.option("--older-than", callback=_seconds, metavar="AGE", help="Submitted longer ago: 90s, 30m, 2h, 7d."),
        click.option("--newer-than", callback=_seconds, metavar="AGE", help="Submitted since then."),
        click.option("--error", metavar="TEXT", help="With this in their error's type or message."),
        click.option("--all", "everything", is_flag=True, help="All that there are, where no filter is given."),
        click.option("--dry-run", is_flag=True, help="Say how many runs match, and do nothing."),
        click.option("--wait", is_flag=True, help="Wait for the end of the job, and print its counts."),
    ]):  # fmt: skip
        function = option(function)
    return click.argument("run_ids", metavar="[RUN]...", nargs=-1)(function)


def wish_of(options: dict[str, Any], run_ids: tuple[str, ...], action: str) -> Wish | None:
    """Take what :func:`filtered` has added out of the options; return None when runs are named by their ids."""
    wish = Wish({name: options.pop(name) for name in _OPTIONS})
    if run_ids and wish.options:
        raise click.UsageError(f"{wish.options[0]} is for `byrd {action}` without RUN")
    if not run_ids and not set(wish.options) - {"--dry-run", "--wait"}:
        raise click.UsageError(
            f"which runs? `byrd {action} RUN...`, or a filter: --workflow, --status, --older-than, --newer-than, "
            "--error; or --all"
        )
    return None if run_ids else wish


def order(
    engine: Byrd,
    action: str,
    wish: Wish,
    *,
    by: str,
    finish: Callable[[Byrd, Run], None],
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Count the runs, or submit the job and say how to follow it."""
    counted = {name: value for name, value in options.items() if name == "terminate"}
    matched = engine.bulk_matches(action, **wish.filter, **counted)
    if wish.dry_run:
        if as_json:
            print_json({"action": action, "matched": matched})
        else:
            say(f"{count(matched, 'run matches', 'runs match')}; without --dry-run, `byrd {action}` is for them.")
        return
    job = engine.bulk(action, **wish.filter, **options, by=by)
    if wish.wait:
        if not as_json:
            say("Submitted ", (job.id, "bold"), f", which is to {action} {count(matched, 'run')}.")
        finish(engine, job)
    elif as_json:
        print_json({"run": job.id, "workflow": job.workflow, "status": str(job.status), "matched": matched})
    else:
        say(
            "Submitted ", (job.id, "bold"), f", which is to {action} {count(matched, 'run')}; "
            f"`byrd show {job.id[:8]} --watch` follows it.",
        )  # fmt: skip
