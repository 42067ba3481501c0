"""The Celery settings that Byrd needs: sets what is not set, refuses, by name, what would lose work."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from celery import Celery
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import DBAPIError, IntegrityError

from byrd.errors import ArgumentError, ConfigurationError, DuplicateStepError, NotMigratedError, UnsafeSettingError
from byrd.store import normalise_url

P = ParamSpec("P")
T = TypeVar("T")

#: Settings that a worker needs to keep up with its steps through outages, where the user has set nothing.
_DEFAULTS: dict[str, Any] = {
    # A message that waits in a worker's hands is lost with it: take one when a pool process is free.
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # Outages of the broker are waited out, at the start and later.
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # So is a broker that answers with refusals: a Redis without memory, or one that has become a replica.
    "broker_channel_error_retry": True,
    # Celery's own tables of results are made when they are needed first.  Steps need none, and one that is the first of
    # its process would fail if Postgres went away just then.
    "database_create_tables_at_setup": False,
    # A running step needs no broker; cancelling it would repeat its work.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
}
#: Without them a publisher or consumer may wait for a frozen Redis for ever (socket_timeout is None by default), or for
#: one that it is cut off from (kombu looks each 25 s whether its connections are dead).
_REDIS_TIMEOUTS = {
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 5,
}
_UNIQUE_VIOLATION = "23505"
_NO_TABLES = ("42P01", "3F000")


def apply(app: Celery, database_url: str | URL | None) -> URL:
    """Configure the app, and return the URL of Byrd's database."""
    broker_url = os.environ.get("BYRD_BROKER_URL")
    if broker_url:
        app.conf.broker_url = broker_url
    url = _database_url(app, database_url)
    refuse_unsafe(app.conf)
    for name, value in _DEFAULTS.items():
        if not _is_set(app, name):
            app.conf[name] = value
    if str(app.conf.broker_url or "").startswith(("redis", "valkey", "sentinel")):
        app.conf.broker_transport_options = {**_REDIS_TIMEOUTS, **(app.conf.broker_transport_options or {})}
    if not app.conf.result_backend:
        app.conf.result_backend = "db+" + url.render_as_string(hide_password=False)
        if not _is_set(app, "result_extended"):
            app.conf.result_extended = True
    return url


def refuse_unsafe(conf: Any) -> None:
    """Raise :class:`UnsafeSettingError` for settings under which steps would be lost or could not be run."""
    if conf.task_protocol != 2:
        _refuse("task_protocol", conf.task_protocol, "its messages have no headers to name a step; use 2")
    for name in ("task_serializer", "result_serializer"):
        if conf[name] != "json":
            _refuse(
                name,
                conf[name],
                "steps are JSON, so that no message can run code and any tool can read them; use 'json'",
            )
    accept = {str(kind) for kind in conf.accept_content or ()}
    if not accept & {"json", "application/json"}:
        _refuse("accept_content", conf.accept_content, "workers would discard the messages of steps; add 'json'")
    if accept & {"pickle", "application/x-python-serialize"}:
        _refuse("accept_content", conf.accept_content, "who can write to the broker could run code; remove 'pickle'")
    if str(conf.broker_url or "").startswith("memory:"):
        _refuse("broker_url", "memory://", "its messages never leave this process; use Redis or another real broker")


def named_errors(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a write of a submit; give the database's refusals their names."""
    try:
        return write(*args, **kwargs)
    except IntegrityError as exc:
        if _sqlstate(exc) == _UNIQUE_VIOLATION:
            detail = str(exc.orig).partition("DETAIL:")[2].strip()
            raise DuplicateStepError(
                f"a task id of the canvas is in use already ({detail}); submit fresh signatures, without task_id"
            ) from exc
        raise
    except ValueError as exc:
        if "NUL" in str(exc):
            raise ArgumentError(
                f"what was submitted contains a NUL character, which Postgres cannot hold: {exc}"
            ) from exc
        raise
    except DBAPIError as exc:
        if _sqlstate(exc) in _NO_TABLES:
            raise NotMigratedError(
                "Byrd's tables are not in the database of this connection; run `byrd migrate`"
            ) from exc
        raise


def _sqlstate(exc: DBAPIError) -> str | None:
    """Return Postgres's own code: the connection is the caller's, so its driver may be psycopg 3 too."""
    return getattr(exc.orig, "pgcode", None) or getattr(exc.orig, "sqlstate", None)


def _database_url(app: Celery, given: str | URL | None) -> URL:
    backend = str(app.conf.result_backend or "")
    found = (
        given
        or os.environ.get("BYRD_DATABASE_URL")
        or app.conf.get("byrd_database_url")
        or (backend if backend.startswith("db+postgres") else None)
    )
    if not found:
        raise ConfigurationError(
            "Byrd needs a Postgres database: set BYRD_DATABASE_URL=postgresql://user:password@host/name, "
            "or pass byrd.Byrd(app, database_url=...); `byrd dev` starts one for you"
        )
    try:
        url = normalise_url(found)
    except UrlError:
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql://user:password@host/name"
        ) from None
    if not url.drivername.startswith("postgresql"):
        raise ConfigurationError(f"Byrd keeps its runs in Postgres, not in {url.drivername}; use postgresql://...")
    return url


def _is_set(app: Celery, name: str) -> bool:
    """Tell whether the user has set a setting, rather than Celery's defaults."""
    return any(name in found for found in app.conf.maps[:-1])


def _refuse(name: str, value: Any, why: str) -> None:
    raise UnsafeSettingError(f"{name} = {value!r} is not safe with Byrd: {why}")


def safe_url(url: str) -> str:
    """Return a URL without its password, for messages."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except UrlError:
        return "(a URL that cannot be read)"
