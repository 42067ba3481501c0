"""Sagas, killed at every boundary: each effect is undone once, in a rollback only."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group

import byrd
from tests.crash_points.scenarios import EVERY, START, Try, effects, slow


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_saga_that_succeeds(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == "CAR"
        assert effects(app) == []

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car")), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=24)
def test_a_rollback(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car"), app.fail.s()), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=8)
def test_a_saga_in_a_chain_that_undoes_itself(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]
        assert [s.saga for s in run.steps() if s.kind == "compensation"] == [1, None]

    inner = byrd.saga(app.reserve.si("car"), app.fail.s())
    attempt(lambda: chain(app.reserve.s("hotel"), inner, app.add.s(1)), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=8)
def test_a_rollback_side_by_side(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1), ("TRAIN train", 1)]
        assert [s.rank for s in run.steps() if s.kind == "compensation"] == [1, 1, 2]

    members = group(app.reserve.si("car"), app.reserve.si("train"))
    attempt(lambda: byrd.saga(app.reserve.si("hotel"), members, app.fail.s()), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=6)
def test_a_pivot_and_what_follows_it(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == "up"
        assert run.info.pivot == 1
        assert effects(app) == [("mail", 1)]

    attempt(lambda: chain(app.reserve.s("hotel"), app.commit.s(), app.fail_once.si("mail")), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=8)
def test_what_can_be_asked_for_is_done_once_and_undone(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("RING ring", 1), ("ring", 1)]

    attempt(lambda: chain(app.buy.si("ring"), app.fail.s()), check=check)
