"""``byrd chaos``: faults in what the command line names, under a known load, and an audit of what came of it."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from byrd.cli.session import Session, command, console, json_text, print_json, say
from byrd.engine.words import count, span
from byrd.errors import ConfigurationError

if TYPE_CHECKING:
    from byrd.chaos import Options, Report
    from byrd.chaos import Session as ChaosSession

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: No more findings of a kind are printed; the JSON has all.
_SHOWN = 10
_WORDS = {
    "worker_killed": "worker killed",
    "child_killed": "pool process killed",
    "worker_stopped": "worker stopped (SIGTERM)",
    "worker_frozen": "worker frozen, then woken",
    "redis_flushed": "Redis flushed",
    "redis_restarted": "Redis restarted: first start",
    "redis_restarted_each_waiting_step": "Redis restarted: each waiting step",
    "postgres_restarted": "Postgres restarted: first start",
    "postgres_restarted_each_waiting_step": "Postgres restarted: each waiting step",
    "postgres_restarted_until_recorded": "Postgres restarted: until what ran is recorded",
    "messages_dropped": "message dropped",
}


def _seconds(text: str) -> float:
    """Read a time: ``60s``, ``10m``, ``1h``, or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no time: write 60s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def add_to(group: click.Group) -> None:
    """Add the command to the group."""
    share = click.FloatRange(0, 1)

    @command(group, "chaos", short_help="Inject faults under load, and audit what came of it.")
    @click.option("--embedded", is_flag=True, help="On servers and workers of its own, with every kind of fault.")
    @click.option("--for", "seconds", type=_seconds, metavar="TIME", default="60s", show_default=True, help="How long.")
    @click.option(
        "--every", type=_seconds, metavar="TIME", default="2s", show_default=True, help="Quiet time between two faults."
    )
    @click.option(
        "--drain",
        type=_seconds,
        metavar="TIME",
        default="60s",
        show_default=True,
        help="Then wait so long for open runs.",
    )
    @click.option(
        "--outage",
        type=_seconds,
        metavar="TIME",
        default="3s",
        show_default=True,
        help="The longest outage of a server.",
    )
    @click.option("--open", "open_runs", type=click.IntRange(1, 1000), default=12, show_default=True, help="Open runs.")
    @click.option("--overlap", is_flag=True, help="Do not wait for recovery between two faults; kill in outages, too.")
    @click.option("--seed", type=int, help="Gives the same load and order of faults again.")
    @click.option(
        "--workers", type=click.IntRange(0, 64), default=0, help="Start, kill and restart so many of its own."
    )
    @click.option("--concurrency", type=click.IntRange(1, 64), default=2, show_default=True, help="Processes of each.")
    @click.option(
        "--kill-worker",
        "kill_workers",
        multiple=True,
        metavar="WHICH",
        help="May be killed: a node name (with * and ?), a process id, or the path of a pid file; repeatable.",
    )
    @click.option("--pause-workers", is_flag=True, help="Workers that may be killed may be frozen (SIGSTOP), too.")
    @click.option("--stop-redis", metavar="CMD", help="A command that stops Redis.")
    @click.option("--start-redis", metavar="CMD", help="A command that starts it again.")
    @click.option("--stop-postgres", metavar="CMD", help="A command that stops Postgres.")
    @click.option("--start-postgres", metavar="CMD", help="A command that starts it again.")
    @click.option("--flush-redis", is_flag=True, help="The broker's whole database may be flushed.")
    @click.option("--drop", type=share, default=0.0, metavar="RATE", help="Drop this share of the load's messages.")
    @click.option("--duplicate", type=share, default=0.0, metavar="RATE", help="Duplicate this share of them.")
    @click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON to this file, too.")
    @click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Keep its workers' logs here.")
    @click.option("--dry-run", is_flag=True, help="Only say what would be touched.")
    def chaos(
        session: Session,
        *,
        embedded: bool,
        seed: int | None,
        stop_redis: str | None,
        start_redis: str | None,
        stop_postgres: str | None,
        start_postgres: str | None,
        report: Path | None,
        logs: Path | None,
        dry_run: bool,
        as_json: bool,
        **given: Any,
    ) -> None:
        """Run a known load, kill what the options name, then say what was lost, repeated or stuck.

        For staging systems.  Nothing is touched but what is named; workers that are to be hit, or to run the load, are
        started with `-I byrd.chaos.load -Q celery,byrd-chaos`.  The exit status is 1 if anything was lost, recorded
        twice, stuck, wrong, or repeated without a reason, or if an invariant of Byrd's tables is broken.
        """
        from byrd.chaos import Options

        options = Options(
            seed=secrets.randbelow(2**31) if seed is None else seed,
            redis=_commands("redis", stop_redis, start_redis),
            postgres=_commands("postgres", stop_postgres, start_postgres),
            **given,
        )
        options = _checked(options, embedded=embedded)
        if dry_run:
            _tell_targets(options, as_json=as_json)
            return
        with _folder(logs) as folder:
            found = _run(session, options, folder, as_json=as_json)
            shape = found.shape()
            if report is not None:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(json_text(shape) + "\n", encoding="utf-8")
            if as_json:
                print_json(shape)
            else:
                _print(found)
            if found.failures:
                raise click.exceptions.Exit(1)


def _commands(server: str, stop: str | None, start: str | None) -> tuple[str, str] | None:
    if stop and start:
        return stop, start
    if stop or start:
        raise ConfigurationError(
            f"--stop-{server} and --start-{server} belong together: what is stopped has to be started again"
        )
    return None


def _checked(options: Options, *, embedded: bool) -> Options:
    if not embedded:
        options.check()
        return options
    from byrd.chaos.embedded import with_all_faults

    if options.kill_workers or options.redis or options.postgres:
        raise ConfigurationError("--embedded has servers and workers of its own; name no others with it")
    return with_all_faults(options)


@contextlib.contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    """Have a folder for the workers' logs; a temporary one is kept only when something went wrong."""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        yield logs
        return
    folder = Path(tempfile.mkdtemp(prefix="byrd-chaos-"))
    try:
        yield folder
    except BaseException:
        if any(folder.iterdir()):
            console(stderr=True).print(f"The logs of its workers are kept in {folder}")
            raise
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _run(session: Session, options: Options, folder: Path, *, as_json: bool) -> Report:
    from byrd.chaos import Session as ChaosSession

    began = time.monotonic()

    def tell(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        console(stderr=as_json).print(Text.assemble((f"{minutes:02}:{seconds:02}  ", "dim"), line), soft_wrap=True)

    if not as_json:
        _tell_targets(options, as_json=False)
    with contextlib.ExitStack() as stack:
        if options.embedded:
            from byrd.chaos.embedded import surroundings

            tell("Starting Postgres and Valkey")
            its = stack.enter_context(surroundings(options, folder))
            one = ChaosSession(
                its.engine,
                options,
                own=its.own,
                redis_server=its.redis_server,
                postgres_server=its.postgres_server,
                say=tell,
            )
        else:
            one = ChaosSession(session.engine(), options, own=_own_workers(session, options, folder), say=tell)
        with _interrupted(one, tell):
            return one.run()


def _own_workers(session: Session, options: Options, folder: Path) -> Any:
    if not options.workers:
        return None
    import os

    from byrd.chaos.targets import OwnWorkers

    if session.wants_app is None:
        raise ConfigurationError("--workers: of which app? Name its module: `byrd -A shop.app chaos ...`, or BYRD_APP")
    return OwnWorkers(
        session.wants_app, options.workers, concurrency=options.concurrency, folder=folder, env=os.environ
    )


@contextlib.contextmanager
def _interrupted(one: ChaosSession, tell: Any) -> Iterator[None]:
    """Let the first Ctrl-C end the faults, and a second one everything."""
    asked: list[bool] = []

    def end_faults() -> None:
        tell("Asked to stop: no more faults; Ctrl-C again leaves out the audit, too")
        one.stop()

    def ask(_number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        # What the signal has interrupted may hold the very lock that this needs.
        threading.Thread(target=end_faults, daemon=True).start()

    # nohup means that a terminal's end is no wish to stop.
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    before = {number: signal.signal(number, ask) for number in _SIGNALS if number != signal.SIGHUP or not under_nohup}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- what people read ------------------------------------------------------------------------------


def _tell_targets(options: Options, *, as_json: bool) -> None:
    if as_json:
        print_json({"targets": options.targets(), "seed": options.seed})
        return
    say("What may be touched, and nothing else:")
    for line in options.targets():
        say(("• ", "bold"), line)
    say((f"Seed {options.seed}; {span(options.seconds)}, then at most {span(options.drain)} to drain.", "dim"))


def _print(report: Report) -> None:
    audit = report.audit
    say("")
    facts = Table.grid(padding=(0, 2, 0, 0))
    statuses = ", ".join(f"{number:,} {status}" for status, number in sorted(audit.statuses.items()))
    facts.add_row("runs", f"{audit.submitted:,} submitted, {audit.finished:,} finished ({statuses})")
    facts.add_row("", f"{len(audit.lost):,} lost, {len(audit.stuck):,} stuck, {len(audit.wrong):,} with a wrong end")
    facts.add_row("steps", f"{audit.completions:,} completed, {len(audit.twice):,} recorded twice")
    reasons = ", ".join(f"{number:,} {_WORDS.get(reason, reason)}" for reason, number in sorted(audit.repeated.items()))
    repeated = sum(audit.repeated.values())
    facts.add_row("effects", f"{audit.effects:,} written, {repeated:,} repeated" + (f": {reasons}" if reasons else ""))
    facts.add_row("", f"{len(audit.unexplained):,} repeated without a reason")
    if audit.unprovoked:
        facts.add_row("", f"{count(len(audit.unprovoked), 'attempt')} cut short by no fault of this session")
    facts.add_row("invariants", f"{count(len(audit.broken), 'row')} of Byrd's tables broken since the session began")
    facts.add_row("faults", ", ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in report.counts.items()))
    early = ", ended early, as asked" if report.interrupted else ""
    facts.add_row("time", f"{span(report.seconds)}, and {span(report.drain_seconds)} to drain{early}")
    console().print(facts)
    _print_recoveries(report)
    findings = {
        "Lost": audit.lost,
        "Wrong end": audit.wrong,
        "Recorded twice": audit.twice,
        "Repeated without a reason": audit.unexplained,
        "Cut short by no fault of this session": audit.unprovoked,
        "Invariants broken": audit.broken,
    }
    for title, found in findings.items():
        if found:
            say("\n", (title, "bold"))
            for one in found[:_SHOWN]:
                say("• ", f"run {one.run[:8]}" + (f", step {one.step}" if one.step else ""), f": {one.what}")
            if len(found) > _SHOWN:
                say(f"  and {len(found) - _SHOWN:,} more: --report FILE has all")
    _verdict(report.failures)


def _print_recoveries(report: Report) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("from the fault to the next start")
    for name in ("faults", "steps", "p50", "p95", "max"):
        table.add_column(name, justify="right")
    for kind, found in sorted(report.audit.recoveries.items()):
        figures = [span(value) if value is not None else "–" for value in (found.p50, found.p95, found.max)]
        name = kind.removesuffix("_until_ready")
        words = f"{_WORDS.get(name, name)}" + ("" if name == kind else ": until ready again")
        table.add_row(words, f"{found.faults:,}", f"{found.steps:,}", *figures)
    if table.row_count:
        say("")
        console().print(table)


def _verdict(failures: Sequence[str]) -> None:
    if failures:
        say("\n", ("Failed: " + "; ".join(failures) + ".", "bold red"))
    else:
        all_well = "Nothing was lost, recorded twice, stuck, or repeated without a reason; no invariant is broken."
        say("\n", (all_well, "green"))
