"""Brings a database to this version of Byrd's tables, and tells which version it has."""

from __future__ import annotations

import functools
import io
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

#: Only one process migrates at a time: the key of a Postgres advisory lock.
_MIGRATION_LOCK = 0x62797264_01


def normalise_url(url: str | URL) -> URL:
    """Return ``url`` for psycopg2, from any of the forms that Celery, Django and Heroku use for Postgres."""
    parsed = make_url(str(url).removeprefix("db+") if isinstance(url, str) else url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg2")
    return parsed


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@functools.cache
def head_revision() -> str:
    """Return the schema version that this Byrd works with."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise RuntimeError("this installation of byrd lacks its migrations; install it again")
    return head


def current_revision(conn: Connection) -> str | None:
    """Return the schema version of the database, or None where Byrd's tables are missing."""
    if conn.execute(text("SELECT to_regclass('byrd.alembic_version')")).scalar() is None:
        return None
    revision: str | None = conn.execute(text("SELECT version_num FROM byrd.alembic_version")).scalar()
    return revision


def migrate(database_url: str | URL) -> str:
    """Create or upgrade Byrd's tables (schema ``byrd``); return the version reached.

    Safe to run from several processes at once, and again: nothing happens when the database is up to date.
    """
    engine = create_engine(normalise_url(database_url), poolclass=NullPool)
    with engine.begin() as conn:
        conn.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        conn.execute(text("CREATE SCHEMA IF NOT EXISTS byrd"))
        config = _config()
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
    return head_revision()


def migration_sql() -> str:
    """Return the SQL of all migrations, for those who apply them by hand."""
    out = io.StringIO()
    config = Config(output_buffer=out)
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    command.upgrade(config, "head", sql=True)
    return out.getvalue()
