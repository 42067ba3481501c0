"""Settings that are read for each submit and each step: remembered, until one changes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from celery import Celery
from kombu.utils.json import dumps
from sqlalchemy.engine import make_url

from byrd.engine import settings
from byrd.errors import UnsafeSettingError
from byrd.task.runtime import MAX_VALUE_BYTES, Runtime
from byrd.task.values import loads


@pytest.fixture
def runtime() -> Runtime:
    app = Celery("settings", broker="redis://127.0.0.1:1", set_as_current=False)
    return Runtime(app, make_url("postgresql://nobody@127.0.0.1:1/none"))


def test_a_setting_is_read_anew_when_it_has_changed(runtime: Runtime) -> None:
    assert runtime.max_value_bytes == MAX_VALUE_BYTES
    runtime.app.conf.byrd_max_value_bytes = 100
    assert runtime.max_value_bytes == 100
    runtime.app.conf.update(byrd_max_value_bytes=200)
    assert runtime.max_value_bytes == 200
    runtime.app.config_from_object({"byrd_max_value_bytes": 300})
    assert runtime.max_value_bytes == 300


def test_a_setting_that_changes_for_the_worse_is_refused_at_the_next_submit(runtime: Runtime) -> None:
    runtime.setting("refuse_unsafe", settings.refuse_unsafe)
    runtime.app.conf.task_serializer = "pickle"
    for _ in range(2):
        with pytest.raises(UnsafeSettingError, match="task_serializer"):
            runtime.setting("refuse_unsafe", settings.refuse_unsafe)
    runtime.app.conf.task_serializer = "json"
    runtime.setting("refuse_unsafe", settings.refuse_unsafe)


@pytest.mark.parametrize(
    "value",
    [None, 1, "text", '"__type__"', [], {"a": [1, {}]}, datetime(2026, 1, 2, tzinfo=UTC), {"__type__": 1}],
)
def test_a_value_is_what_it_was(value: object) -> None:
    assert loads(dumps(value)) == value
