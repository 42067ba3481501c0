"""A store on an empty database, and the world around it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from byrd.store import Store
from byrd.store.rows import query
from tests.servers import Server, execute, url_of
from tests.store.interleavings import LOG
from tests.store.sessions import gates
from tests.store.world import World


@pytest.fixture(scope="session")
def shared_store(postgres_server: Server, database_template: str) -> Iterator[Store]:
    """A store that the tests of this folder share, one after another: a database for each would take longer."""
    name = f"byrd_store_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, database_template)
    found = Store(url_of(postgres_server, name))
    yield found
    found.close()
    execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def store(shared_store: Store) -> Store:
    """A store on an empty database."""
    for table in ("runs", "workers", "limits"):  # the other tables go with the runs
        shared_store.run(query, f"DELETE FROM byrd.{table}")
    return shared_store


@pytest.fixture
def world(store: Store) -> Iterator[World]:
    """A driver of that store; whatever a test did, it leaves the tables as they must be."""
    found = World(store)
    yield found
    found.check()


@pytest.fixture
def noted_store(database_url: str) -> Iterator[Store]:
    """A store whose tables note their changes, and whose sessions stop before their statements."""
    store = Store(database_url, pool_size=10)
    store.run(query, LOG.replace("%", "%%"))
    undo = gates(store)
    yield store
    undo()
    store.close()
