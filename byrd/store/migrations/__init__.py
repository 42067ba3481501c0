"""Alembic migrations of Byrd's own Postgres schema."""
