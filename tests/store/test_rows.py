"""Statements that the driver runs without SQLAlchemy: they fail, and are seen, as all others are."""

from __future__ import annotations

from typing import Any, Self

import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, ProgrammingError

from byrd.store.rows import query, rows_of
from tests.store.world import World


def ask(conn: Connection, /, sql: str, **params: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in rows_of(conn, sql, params)]


def test_rows_with_bound_parameters(world: World) -> None:
    assert world.store.run_alone(ask, "SELECT %(a)s, %(b)s::int[]", a="';--", b=[1, 2]) == [("';--", [1, 2])]


def test_an_error_is_the_one_that_sqlalchemy_raises(world: World) -> None:
    with pytest.raises(ProgrammingError, match="no_such_function") as caught:
        world.store.run_alone(ask, "SELECT no_such_function()")
    assert not caught.value.connection_invalidated
    assert getattr(caught.value.orig, "pgcode", None) == "42883"
    assert world.store.run_alone(ask, "SELECT 1") == [(1,)]


def test_a_value_that_cannot_be_sent_leaves_the_connection_as_it_was(world: World) -> None:
    def twice(conn: Connection) -> list[tuple[Any, ...]]:
        with pytest.raises(ValueError, match="NUL"):
            ask(conn, "SELECT %(a)s", a="\0")
        return ask(conn, "SELECT 1")

    assert world.store.run_alone(twice) == [(1,)]


def test_a_connection_that_is_lost_is_replaced_and_the_statement_run_again(world: World) -> None:
    def backend(conn: Connection) -> Any:
        return ask(conn, "SELECT pg_backend_pid()")[0][0]

    first = world.store.run_alone(backend)
    world.store.run(lambda conn: query(conn, "SELECT pg_terminate_backend(%(pid)s)", {"pid": first}).all())
    assert world.store.run_alone(backend) != first


def test_a_connection_that_is_lost_in_the_middle_is_not_given_out_again(world: World) -> None:
    pids: list[int] = []

    def ends_itself(conn: Connection) -> None:
        pids.append(ask(conn, "SELECT pg_backend_pid()")[0][0])
        if len(pids) == 1:
            ask(conn, "SELECT pg_terminate_backend(pg_backend_pid())")

    world.store.run_alone(ends_itself)
    assert len(set(pids)) == 2


def test_an_interruption_costs_the_connection(world: World) -> None:
    """Nobody knows what has become of the statement."""

    class Interrupted(BaseException):
        pass

    class Cursor:
        def __enter__(self) -> Self:
            raise Interrupted

        def __exit__(self, *_: object) -> None: ...

    class Raw:
        def cursor(self) -> Cursor:
            return Cursor()

    def interrupted(conn: Connection) -> None:
        fairy: Any = conn.connection
        real, fairy.dbapi_connection = fairy.dbapi_connection, Raw()
        try:
            with pytest.raises(Interrupted):
                rows_of(conn, "SELECT 1", {})
        finally:
            real.close()
        assert conn.invalidated

    world.store.run_alone(interrupted)


def test_who_listens_to_sqlalchemy_is_told(world: World) -> None:
    told: list[str] = []
    hear = lambda _conn, _cursor, sql, *_: told.append(sql)  # noqa: E731
    engine = world.store.engine
    event.listen(engine, "before_cursor_execute", hear)
    try:
        assert world.store.run(ask, "SELECT %(a)s", a=1) == [(1,)]
    finally:
        event.remove(engine, "before_cursor_execute", hear)
    assert told == ["SELECT %(a)s"]
    assert world.store.run(ask, "SELECT %(a)s", a=1) == [(1,)]
    assert told == ["SELECT %(a)s"]


def test_what_postgres_refuses_is_no_outage(world: World) -> None:
    with pytest.raises(DBAPIError, match="division by zero"):
        world.store.run_alone(ask, "SELECT 1 / %(a)s", a=0)
