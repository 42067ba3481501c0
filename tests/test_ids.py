"""Ids of runs and steps: as random as ever for people, and near each other for an index."""

from __future__ import annotations

import uuid
from itertools import pairwise

import pytest

from byrd import ids


def test_they_are_uuids_that_differ_in_their_first_eight_digits() -> None:
    found = [ids.new_id() for _ in range(2000)]
    assert {uuid.UUID(one).version for one in found} == {4}
    assert [str(uuid.UUID(one)) for one in found] == found
    assert len(set(found)) == 2000
    assert len({one[:8] for one in found}) > 1990


def test_those_of_a_minute_are_next_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr("byrd.ids.time.time", lambda: now)
    first = {ids.new_id()[:2] for _ in range(100)}
    assert len(first) == 1
    now += 60
    [before], [after] = first, {ids.new_id()[:2] for _ in range(100)}
    assert (int(after, 16) - int(before, 16)) % 256 == 1


def test_the_minutes_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for minute in range(257):
        monkeypatch.setattr("byrd.ids.time.time", lambda minute=minute: 60.0 * minute)
        seen.append(int(ids.new_id()[:2], 16))
    assert sorted(seen[:256]) == list(range(256))
    assert seen[256] == seen[0]
    assert all((b - a) % 256 == 1 for a, b in pairwise(seen))
