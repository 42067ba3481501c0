"""`make demo`: the competitor monitor at work, with a worker killed and Redis emptied in the middle of a run.

Starts Postgres, Valkey and two workers, serves a rival's web site on loopback, looks at it, lets it change, and looks
again. During the second look the worker that captures the pages gets SIGKILL, and Redis a FLUSHALL. Then everything is
checked against what the site knows of its own changes; what is missing makes the exit status 1.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine, text

import byrd.store
from byrd import embedded
from tasks import store
from tasks.checkup import Evidence, Inbox, Verdict, check_all, summarise
from tasks.rival import RivalServer
from tasks.schema import create_tables

FOLDER = Path(".byrd/demo")
TIME_LIMIT = 90.0
CRAWL_DELAY = 0.12
BATCH = 8
KILL_AFTER_REQUESTS = 3 * BATCH + 4  # in the middle of a batch, which has to be read again
WORKERS = 2
SECRET = "demo"  # noqa: S105 - signs what goes from this machine to itself

# The worker becomes the leader of a process group of its own. Beside it waits a shell for the end of a pipe that only
# we hold: whatever ends us, the group ends too. Its child's child, for Celery minds children that are not its own.
_LEASH = 'exec 3<&0 </dev/null; ( ( read -r _ <&3; kill -KILL -$$ ) & ); exec 3<&-; exec "$@"'


class DemoError(Exception):
    """The demo cannot go on; the message says where it stopped."""


@dataclass(frozen=True)
class Worker:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL to the worker and its pool at once, as when a machine goes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Demo:
    """The scene: what runs, and what is shown of it."""

    def __init__(self, console: Console, progress: Progress, database_url: str, broker_url: str) -> None:
        self.started = time.monotonic()
        self.console = console
        self.progress = progress
        self.database_url = database_url
        self.broker_url = broker_url

    def say(self, message: str) -> None:
        self.console.print(
            f"[dim]{time.monotonic() - self.started:5.1f} s[/]  {message}", highlight=False, soft_wrap=True
        )

    def wait(self, what: str, condition: Callable[[], Any], *, look_every: float = 0.1) -> Any:
        """Look again and again until the condition gives something; returns that."""
        while True:
            found = condition()
            if found:
                return found
            if time.monotonic() - self.started > TIME_LIMIT:
                raise DemoError(f"After {TIME_LIMIT:g} s the demo was still waiting for {what}.")
            time.sleep(look_every)


def main() -> int:
    """Run the demo; the exit status is 0 when all that it promises was seen."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print("\n[bold]Byrd[/]: a competitor monitor that a dead worker and an empty Redis do not stop\n")
    shutil.rmtree(FOLDER, ignore_errors=True)
    folder = FOLDER.resolve()
    folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logs: list[Path] = []
    try:
        evidence, verdicts = _play(console, folder, logs)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        console.print(f"\n[bold red]The demo stopped[/]: {error}", highlight=False)
        _show_logs(console, logs)
        if isinstance(error, DemoError):
            return 1
        raise
    summarise(console, evidence, verdicts)
    if all(verdict.good for verdict in verdicts):
        return 0
    _show_logs(console, logs)
    return 1


def _play(console: Console, folder: Path, logs: list[Path]) -> tuple[Evidence, list[Verdict]]:
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console, transient=not console.is_terminal))
        started = time.monotonic()
        postgres = stack.enter_context(embedded.postgres())
        valkey = stack.enter_context(embedded.valkey())
        byrd.store.migrate(postgres.url)
        demo = Demo(console, progress, postgres.url, valkey.url)
        demo.started = started
        demo.say("Postgres and Valkey run, and have their tables")
        inbox = stack.enter_context(Inbox(SECRET))
        rival = stack.enter_context(RivalServer(crawl_delay=CRAWL_DELAY, latency=0.02))
        database = stack.enter_context(store.open_database(postgres.url))
        os.environ |= _environment(demo, folder, inbox)
        workers = [stack.enter_context(_worker(f"worker-{number}", folder, logs)) for number in range(1, WORKERS + 1)]
        evidence = _story(demo, database, rival, inbox, workers, folder)
        return evidence, check_all(evidence)


def _story(
    demo: Demo, database: Engine, rival: RivalServer, inbox: Inbox, workers: list[Worker], folder: Path
) -> Evidence:
    from tasks.app import engine  # reads the environment, which had no servers before

    with database.begin() as connection:
        create_tables(connection)
        competitor = store.register_competitor(connection, name="Corvane", base_url=rival.url)
    demo.wait("the workers", lambda: _all_running(workers) and len(engine.workers()) == len(workers))
    demo.say(f"{len(workers)} workers are ready; [bold]Corvane[/], at {rival.url}, is the competitor")

    first = engine.submit("monitor.check", competitor)
    bar = _bar(demo, "First look ", len(rival.site.public_paths))
    demo.wait("the first look", lambda: _follow(demo, database, bar, first))
    first_traffic = rival.traffic
    demo.say("The first look is done; now the rival changes its site")

    rival.version = 2
    rival.reset_traffic()
    second = engine.submit("monitor.check", competitor)
    bar = _bar(demo, "Second look", len(rival.site.public_paths))

    def halfway() -> bool:
        _follow(demo, database, bar, second)
        return rival.page_requests >= KILL_AFTER_REQUESTS

    demo.wait("the middle of the second look", halfway, look_every=0.02)
    victim = _holder(engine, second, workers)
    pages_at_kill = _captured(database, second.id)
    victim.kill()
    killed_at = datetime.now(UTC)
    with redis.Redis.from_url(demo.broker_url) as client:
        keys = int(client.dbsize())
        client.flushall()
    demo.say(f"[bold red]SIGKILL[/] to {victim.name}, which was capturing, {pages_at_kill} pages on record")
    demo.say(f"[bold red]FLUSHALL[/] on Redis: {keys} keys are gone")
    capture = demo.wait("the other worker to take over", lambda: _follow(demo, database, bar, second, restart=True))
    resumed_after = (capture.started_at - killed_at).total_seconds()
    demo.say(f"[bold green]The other worker goes on[/] {resumed_after:.1f} s after the kill, from the last checkpoint")
    demo.wait("the second look", lambda: _follow(demo, database, bar, second))
    return Evidence(
        database=database,
        folder=folder,
        rival=rival,
        inbox=inbox,
        first=first,
        second=second,
        first_traffic=first_traffic,
        second_traffic=rival.traffic,
        crawl_delay=CRAWL_DELAY,
        pages_at_kill=pages_at_kill,
        resumed_after=resumed_after,
        seconds=time.monotonic() - demo.started,
        time_limit=TIME_LIMIT,
    )


# ------------------------------------------------------------------------------------------------- what is shown


def _bar(demo: Demo, description: str, total: int) -> TaskID:
    return demo.progress.add_task(description, total=total, note="")


def _follow(demo: Demo, database: Engine, bar: TaskID, run: Any, *, restart: bool = False) -> Any:
    """Show where a run stands; gives something when it is over, or, on request, when its first step was restarted."""
    steps = run.steps()
    working = next((step for step in steps if step.status in {"ready", "running"}), None)
    note = "done"
    if working is not None:
        waits = " waits" if working.status == "ready" else ""
        again = f", attempt {working.attempt}" if working.attempt > 1 else ""
        note = f"{working.task.rpartition('.')[2].replace('_', ' ')}{waits}{again}"
    demo.progress.update(bar, completed=_captured(database, run.id), note=note)
    status = run.status
    if status.final and status != "succeeded":
        run.get(timeout=0)  # raises what failed it
    if restart:
        return steps[0] if steps[0].attempt > 1 and steps[0].started_at else None
    return status.final


def _captured(database: Engine, run_id: str) -> int:
    with database.connect() as connection:
        count = connection.scalar(text("SELECT count(*) FROM monitor.captures WHERE run_id = :run"), {"run": run_id})
    return int(count or 0)


def _show_logs(console: Console, logs: list[Path]) -> None:
    for log in logs:
        if log.exists():
            console.print(f"\n[bold]The end of {log}[/]", soft_wrap=True)
            lines = log.read_text(errors="replace").splitlines()[-25:]
            console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------- workers


def _environment(demo: Demo, folder: Path, inbox: Inbox) -> dict[str, str]:
    return {
        "BYRD_DATABASE_URL": demo.database_url,
        "BYRD_BROKER_URL": demo.broker_url,
        "MONITOR_ALLOWED_NETWORKS": "127.0.0.0/8",
        "MONITOR_MIN_INTERVAL": "0.05",  # robots.txt asks for more, and gets it
        "MONITOR_BATCH_SIZE": str(BATCH),
        "MONITOR_REPORTS": str(folder / "reports"),
        "MONITOR_MAIL_FOLDER": str(folder / "mail"),
        "MONITOR_MAIL_TO": "team@example.com",
        "MONITOR_WEBHOOK_URL": inbox.url,
        "MONITOR_WEBHOOK_SECRET": SECRET,
    }


@contextmanager
def _worker(name: str, folder: Path, logs: list[Path]) -> Iterator[Worker]:
    log = folder / f"{name}.log"
    logs.append(log)
    celery = [sys.executable, "-m", "celery", "-A", "tasks.app", "worker"]
    options = ["--concurrency=2", f"--hostname={name}@demo", "--loglevel=INFO"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _LEASH, "demo", *celery, *options],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Worker(name, process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.stdin is not None:
            process.stdin.close()  # cuts the leash
        process.wait()


def _all_running(workers: list[Worker]) -> bool:
    for worker in workers:
        if worker.process.poll() is not None:
            raise DemoError(f"{worker.name} ended with status {worker.process.returncode} while it started.")
    return True


def _holder(engine: Any, run: Any, workers: list[Worker]) -> Worker:
    """The worker that runs the page executor now."""
    holder = run.steps()[0].worker_id
    pid = next((row.pid for row in engine.workers() if row.id == holder), None)
    for worker in workers:
        if worker.process.pid == pid:
            return worker
    raise DemoError("The page executor was not running when it should have been killed.")


if __name__ == "__main__":
    sys.exit(main())
