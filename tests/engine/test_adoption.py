"""One line adopts an app; what would lose work is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, Task

import byrd
from byrd.errors import ConfigurationError, TaskOverrideError, UnsafeSettingError

URL = "postgresql://nobody@127.0.0.1:1/none"


@pytest.fixture(autouse=True)
def no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BYRD_DATABASE_URL", raising=False)
    monkeypatch.delenv("BYRD_BROKER_URL", raising=False)


def make(**conf: Any) -> Celery:
    app = Celery("adopted", broker="redis://127.0.0.1:1", set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_protocol", 1),
        ("task_serializer", "pickle"),
        ("task_serializer", "yaml"),
        ("result_serializer", "pickle"),
        ("accept_content", ["yaml"]),
        ("accept_content", ["json", "pickle"]),
        ("broker_url", "memory://"),
    ],
)
def test_unsafe_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsafeSettingError, match=name):
        byrd.Byrd(make(**{name: value}), URL)


def test_settings_that_become_unsafe_later_are_refused_at_submit() -> None:
    app = make()
    engine = byrd.Byrd(app, URL)
    engine._live = True
    app.conf.task_serializer = "pickle"
    with pytest.raises(UnsafeSettingError, match="task_serializer"):
        engine.submit(app.signature("x"))


def test_what_is_not_set_is_set_and_what_is_set_is_kept() -> None:
    app = make(worker_prefetch_multiplier=7, broker_transport_options={"socket_timeout": 99})
    byrd.Byrd(app, URL)
    assert app.conf.worker_prefetch_multiplier == 7
    assert app.conf.worker_disable_prefetch is True
    assert app.conf.broker_transport_options["socket_timeout"] == 99
    assert app.conf.broker_transport_options["socket_connect_timeout"] == 5
    assert app.conf.result_backend.startswith("db+postgresql+psycopg2://")


def test_the_database_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="BYRD_DATABASE_URL"):
        byrd.Byrd(make())
    assert byrd.Byrd(make(byrd_database_url=f"{URL}1")).runtime.store.url.database == "none1"
    assert byrd.Byrd(make(result_backend=f"db+{URL}2")).runtime.store.url.database == "none2"
    monkeypatch.setenv("BYRD_DATABASE_URL", f"{URL}3")
    assert byrd.Byrd(make(byrd_database_url=f"{URL}1")).runtime.store.url.database == "none3"
    assert byrd.Byrd(make(), f"{URL}4").runtime.store.url.database == "none4"
    with pytest.raises(ConfigurationError, match="sqlite"):
        byrd.Byrd(make(), "sqlite:///x.db")
    with pytest.raises(ConfigurationError, match="postgresql://user"):
        byrd.Byrd(make(), "what is this")


def test_the_broker_of_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYRD_BROKER_URL", "redis://127.0.0.1:2/5")
    app = make()
    byrd.Byrd(app, URL)
    assert app.conf.broker_url == "redis://127.0.0.1:2/5"


def test_one_engine_per_app() -> None:
    app = make()
    engine = byrd.Byrd(app, URL)
    assert app.byrd is engine
    with pytest.raises(ConfigurationError, match="already"):
        byrd.Byrd(app, URL)


@pytest.mark.parametrize("name", ["retry", "replace", "add_to_chord", "signature_from_request"])
def test_a_base_class_that_overrides_what_byrd_needs(name: str) -> None:
    app = make()
    byrd.Byrd(app, URL)
    base = type("Mine", (Task,), {"abstract": True, name: lambda self, *args, **kwargs: None})
    with pytest.raises(TaskOverrideError, match=rf"Mine.*{name}"):
        app._task_from_fun(_nightly, name="mine", base=base)


def test_class_based_tasks_are_adopted() -> None:
    app = make()

    class Early(Task):
        name = "early"

        def run(self) -> None:
            """Do nothing."""

    class Late(Task):
        name = "late"

        def run(self) -> None:
            """Do nothing."""

    app.register_task(Early())
    byrd.Byrd(app, URL)
    app.register_task(Late())
    assert isinstance(app.tasks["early"], byrd.DurableTask)
    assert isinstance(app.tasks["late"], byrd.DurableTask)
    assert isinstance(app.tasks["celery.map"], byrd.DurableTask)


def test_a_workflow_may_go_by_its_functions_name() -> None:
    engine = byrd.Byrd(make(), URL)
    nightly = engine.workflow(_nightly)
    assert engine.workflows == [f"{__name__}._nightly"]
    assert nightly.name == engine.workflows[0]
    assert nightly.__doc__ == "A canvas."


def _nightly() -> None:
    """A canvas."""


def test_a_workflow_name_is_taken_once() -> None:
    engine = byrd.Byrd(make(), URL)
    engine.workflow("one")(lambda: None)
    with pytest.raises(ConfigurationError, match="registered already"):
        engine.workflow("one")(lambda: None)
    with pytest.raises(ConfigurationError, match="must be 1 to 200"):
        engine.workflow("two words")
