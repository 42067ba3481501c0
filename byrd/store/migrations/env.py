"""Runs Byrd's migrations on the connection that :func:`byrd.store.migrate.migrate` hands over, or prints them."""

from __future__ import annotations

from typing import Any

from alembic import context

config = context.config
options: dict[str, Any] = {"version_table_schema": "byrd", "include_schemas": True}

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.execute("CREATE SCHEMA IF NOT EXISTS byrd")
        context.run_migrations()
else:
    context.configure(connection=config.attributes["connection"], transactional_ddl=True, **options)
    with context.begin_transaction():
        context.run_migrations()
