"""Many runs in one transaction; and texts of all kinds, which the arrays of a batch must hold to the letter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from byrd import errors
from byrd.store import normalise_url
from byrd.store.plans import _array
from tests.cluster import Cluster

APP = "tests.apps.basic"


@pytest.fixture
def app(cluster: Cluster) -> Any:
    return cluster.app(APP)


@pytest.fixture
def worker(cluster: Cluster) -> None:
    cluster.worker(APP)


@pytest.fixture
def own_engine(cluster: Cluster) -> Iterator[Any]:
    engine = create_engine(normalise_url(cluster.database_url))
    yield engine
    engine.dispose()


def count(cluster: Cluster) -> int:
    return int(cluster.rows("SELECT (SELECT count(*) FROM byrd.runs) + (SELECT count(*) FROM byrd.steps)")[0][0])


def messages(cluster: Cluster) -> int:
    with cluster.redis() as client:
        return int(client.llen("celery"))


def test_the_runs_come_in_the_order_of_their_canvases(app: Any, worker: None) -> None:
    canvases = [
        app.add.s(1, 1),
        chain(app.add.s(1, 1), app.add.s(1)),
        chord([app.add.s(1, n) for n in range(3)], app.total.s()),
        group(app.echo.s(n) for n in range(3)),
        group([]),
        app.add.s(2, 2).set(countdown=0.5),
        app.echo.s(7),
    ]
    runs = app.engine.submit_many(canvases)
    assert [run.get(timeout=30) for run in runs] == [2, 3, 6, [0, 1, 2], [], 4, 7]


def test_any_iterable_and_none_at_all(app: Any, cluster: Cluster) -> None:
    assert app.engine.submit_many([]) == []
    assert app.engine.submit_many(iter(())) == []
    assert count(cluster) == 0
    runs = app.engine.submit_many((app.echo.s(n) for n in range(40)), keys=(f"k{n}" for n in range(40)))
    assert len({run.id for run in runs}) == 40
    assert [run.key for run in (app.engine.get(run.id).info for run in runs)] == [f"k{n}" for n in range(40)]
    assert messages(cluster) <= 16, "wake-ups enough"


def test_one_commit_for_all(app: Any, cluster: Cluster) -> None:
    app.engine.submit_many(chain(app.echo.s(n), app.echo.s()) for n in range(100))
    assert cluster.rows("SELECT count(DISTINCT xmin::text) FROM byrd.runs") == [(1,)]
    assert cluster.rows(
        "SELECT count(*) FROM byrd.events WHERE event = 'submitted' AND detail::json->>'steps' = '2'"
    ) == [(100,)]


def test_keys(app: Any, cluster: Cluster) -> None:
    old = app.engine.submit(app.echo.s(1), key="a")
    runs = app.engine.submit_many([app.echo.s(n) for n in range(4)], keys=["b", "a", None, None])
    assert runs[1].id == old.id
    assert len({run.id for run in runs}) == 4
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(4,)]
    assert cluster.rows("SELECT args::text FROM byrd.steps WHERE run_id = %s", old.id) == [("[1]",)]
    before = count(cluster)
    again = app.engine.submit_many([app.echo.s(n) for n in range(2)], keys=["b", "a"])
    assert [run.id for run in again] == [runs[0].id, old.id]
    assert count(cluster) == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["a"], "need as many keys"),
        (["a", "b", "c"], "need as many keys"),
        (["a", "a"], "same key"),
        (["a", ""], "key"),
    ],
)
def test_keys_that_do_not_fit(app: Any, cluster: Cluster, keys: list[str], words: str) -> None:
    with pytest.raises(errors.ArgumentError, match=words):
        app.engine.submit_many([app.echo.s(1), app.echo.s(2)], keys=keys)
    assert count(cluster) == 0


def test_all_or_nothing(app: Any, cluster: Cluster) -> None:
    app.engine.submit(app.echo.s(0).set(task_id="taken"))
    before = count(cluster)
    for bad, error in [
        (app.echo.s(object()), errors.ArgumentError),
        (app.app.signature("no.such.task"), errors.UnknownTaskError),
        ("no.such.workflow", errors.UnknownWorkflowError),
        (app.echo.s(1).set(task_id="taken"), errors.DuplicateStepError),
        (42, errors.CanvasError),
    ]:
        with pytest.raises(error):
            app.engine.submit_many([app.echo.s(1), app.echo.s(2), bad, app.echo.s(3)])
        assert (count(cluster), messages(cluster)) == (before, 1)
    twice = [app.echo.s(1).set(task_id="same"), app.echo.s(2).set(task_id="same")]
    with pytest.raises(errors.DuplicateStepError):
        app.engine.submit_many(twice)
    assert count(cluster) == before


def test_in_the_callers_transaction(app: Any, cluster: Cluster, worker: None, own_engine: Any) -> None:
    with own_engine.connect() as conn:
        app.engine.submit_many([app.echo.s(1), app.echo.s(2)], connection=conn, keys=["a", "b"])
        conn.rollback()
    assert count(cluster) == 0
    with Session(own_engine) as session:
        session.execute(text("CREATE TABLE orders (id int)"))
        runs = app.engine.submit_many(
            [app.echo.s(1), chain(app.echo.s(2), app.echo.s()), group([])], connection=session, keys=["a", "b", "c"]
        )
        assert count(cluster) == 0
        session.commit()
    assert [run.get(timeout=30) for run in runs] == [1, 2, []]


def test_workflows_by_name_among_them(app: Any, worker: None) -> None:
    build = app.engine.workflow("test.seven", timeout=60)(lambda: app.echo.s(value=7))
    runs = app.engine.submit_many(["test.seven", app.echo.s(1), build], keys=["a", "b", "c"], timeout=None)
    assert [run.get(timeout=30) for run in runs] == [7, 1, 7]
    assert [run.workflow for run in runs] == ["test.seven", None, "test.seven"]
    assert runs[0].info.deadline is not None
    assert runs[1].info.deadline is None
    assert build.submit(key="a").id == runs[0].id


def test_a_deadline_for_each(app: Any) -> None:
    runs = app.engine.submit_many([app.echo.s(1), app.echo.s(2)], timeout=100)
    assert all(90 < (run.info.deadline - run.info.created_at).total_seconds() < 110 for run in runs)


# ------------------------------------------------------------------------------------------------- texts

TEXTS = [
    "", " ", "NULL", "null", "{", "}", "{}", "{1,2}", ",", ",,", '"', '""', "\\", "\\\\", '\\"', "\\N", "'", "''", "%s",
    "%(run)s", "%%",
    "a\nb", "\r\n", "\t", "\x01\x7f", "ü€😀", "\u2028", "\u00a0", "e\u0301",
    " leading and trailing ", "$$", "--", ";", "{NULL}", '{"a": "b"}',
]  # fmt: skip


def test_texts_survive_to_the_letter(app: Any, cluster: Cluster, worker: None) -> None:
    """In arguments, keys and task ids of several runs at once."""
    named = [value for value in TEXTS if value]
    runs = app.engine.submit_many(
        (chain(app.echo.s([value, {value: value}]).set(task_id=f"id {value}"), app.echo.s()) for value in named),
        keys=(f"key {value}" for value in named),
    )
    for run, value in zip(runs, named, strict=True):
        assert run.get(timeout=30) == [value, {value: value}]
        assert run.steps()[0].id == f"id {value}"
        assert run.info.key == f"key {value}"
    assert app.engine.submit(app.echo.s(TEXTS)).get(timeout=30) == TEXTS
    assert app.engine.submit(app.echo.s(value="")).get(timeout=30) == ""


@pytest.mark.parametrize("value", TEXTS)
def test_texts_in_options_titles_and_groups(app: Any, cluster: Cluster, value: str) -> None:
    sig = app.echo.s(1).set(headers={"h": value, value: "v"}, queue="q")
    run = app.engine.submit(group(sig, app.echo.s(value)))
    [options, kept] = cluster.rows("SELECT options, args FROM byrd.steps WHERE kind = 'task' ORDER BY no")
    assert json.loads(options[0])["headers"] == {"h": value, value: "v"}
    assert json.loads(kept[1]) == [value]
    assert run.steps()[0].queue == "q"


def test_the_arrays_are_what_postgres_reads(cluster: Cluster) -> None:
    assert cluster.rows("SELECT %s::text[]", _array(TEXTS)) == [(TEXTS,)]
    assert cluster.rows("SELECT %s::text[]", _array([None, *TEXTS, None])) == [([None, *TEXTS, None],)]
    assert cluster.rows("SELECT %s::int[]", _array([1, None, -3])) == [([1, None, -3],)]
    assert cluster.rows("SELECT %s::bool[]", _array([True, None, False])) == [([True, None, False],)]
    assert cluster.rows("SELECT %s::float8[]", _array([0.1, None, 1e300, -2.5e-8])) == [([0.1, None, 1e300, -2.5e-8],)]
    assert _array([None, None]) is None
    assert _array([]) is None
    assert _array(["task", "task"], "task") is None
    assert _array(["task", None], "task") == '{"task",NULL}'
