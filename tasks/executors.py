"""The workflow `monitor.check` and its three executors: capture the pages, write the report, dispatch it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

from celery import chain
from sqlalchemy import Connection, Engine

import byrd
from tasks import check, dispatch, store
from tasks.app import app, engine
from tasks.fetch import Fetcher, TemporaryError
from tasks.settings import SettingError, settings


@engine.workflow("monitor.check")
def check_competitor(competitor_id: int) -> Any:
    """Look at all pages of a competitor, report what changed since the last time, and tell."""
    return chain(capture_pages.s(competitor_id), write_report.s(), dispatch_report.s())


@app.task(
    name="monitor.capture_pages",
    bind=True,
    base=byrd.CheckpointTask,
    autoretry_for=(TemporaryError,),  # the site's robots.txt or sitemap; a single page has tries of its own
    retry_backoff=5,
    max_retries=8,
)
def capture_pages(self: Any, competitor_id: int) -> dict[str, Any]:
    """The page executor: capture every page that the site lists, in checkpointed batches."""
    run_id = UUID(self.request.root_id)
    config = settings()

    def save(connection: Connection, outcomes: Sequence[byrd.Outcome]) -> None:
        check.save(run_id, connection, [outcome.value for outcome in outcomes])

    with monitor_database() as database, Fetcher(database, config) as fetcher:
        listed = self.step("discover", check.discover, database, fetcher, run_id, competitor_id)
        progress = self.iterate(
            partial(check.pages_to_capture, database, run_id),
            partial(check.capture, database, fetcher),
            save=save,
            name="pages",
            batch_size=config.batch_size,
            parallelism=config.parallelism,
        )
    return {"listed": listed, "captured": progress.completed, "failed": progress.failed}


@app.task(name="monitor.write_report", bind=True)
def write_report(self: Any, captured: dict[str, Any]) -> dict[str, Any]:
    """The report executor: find what disappeared, and write the report to the database and to a file."""
    run_id = UUID(self.request.root_id)
    with monitor_database() as database, database.begin() as connection:
        report = check.conclude(connection, run_id)
    path = dispatch.write_file(settings().reports / f"{run_id}.html", report.html.encode())
    return {**captured, "report": str(path), "changes": report.summary["changes"]}


@app.task(
    name="monitor.dispatch_report",
    bind=True,
    base=byrd.CheckpointTask,
    autoretry_for=(dispatch.DispatchError,),
    retry_backoff=5,
    max_retries=10,
)
def dispatch_report(self: Any, written: dict[str, Any]) -> dict[str, Any]:
    """The dispatch executor: each channel in a sub-step of its own, so that a retry repeats only what failed."""
    run_id = UUID(self.request.root_id)
    config = settings()
    with monitor_database() as database:
        sent = {
            channel: self.step(channel, dispatch.notify, database, config, run_id, channel)
            for channel in dispatch.channels(config)
        }
    return {**written, "sent": sent}


@contextmanager
def monitor_database() -> Iterator[Engine]:
    """Byrd's database, on connections of the executor's own: slots are booked outside the fenced transaction."""
    url = os.environ.get("BYRD_DATABASE_URL")
    if not url:
        raise SettingError("BYRD_DATABASE_URL must name the Postgres database: postgresql://...")
    with store.open_database(url) as database:
        yield database
