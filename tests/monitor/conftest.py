"""The monitor's own database tables, the rival's site, and a web server to script."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tasks.rival import RivalServer
from tasks.schema import create_tables
from tasks.store import open_database
from tests.monitor.web import Scripted


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """A pool on a fresh database that has the monitor's tables."""
    with open_database(database_url) as engine:
        with engine.begin() as connection:
            create_tables(connection)
        yield engine


@pytest.fixture
def rival() -> Iterator[RivalServer]:
    with RivalServer() as server:
        yield server


@pytest.fixture
def web() -> Iterator[Scripted]:
    with Scripted() as server:
        yield server
