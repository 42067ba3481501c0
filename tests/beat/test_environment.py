"""What the settings take from the environment: the database's address and the secret key."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from beat.environment import database, listed, secret_key, switch


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://ada:p%40ss@db.example:6432/shop",
            dict(NAME="shop", USER="ada", PASSWORD="p@ss", HOST="db.example", PORT="6432"),
        ),
        ("postgres://db.example/shop", dict(NAME="shop", USER="", PASSWORD="", HOST="db.example", PORT="")),
        ("postgresql+psycopg2://[::1]/shop", dict(NAME="shop", HOST="::1")),
        ("postgresql://ada@/shop?host=/run/postgresql&port=5433", dict(HOST="/run/postgresql", PORT="5433")),
    ],
)
def test_a_database_url_is_taken_apart(url: str, expected: dict[str, Any]) -> None:
    described = database({"BYRD_DATABASE_URL": url})
    assert {name: described[name] for name in expected} == expected


def test_what_else_the_url_asks_for_is_passed_on() -> None:
    options = database({"BYRD_DATABASE_URL": "postgresql://h/d?sslmode=require&options=-c%20statement_timeout%3D9s"})[
        "OPTIONS"
    ]
    assert options["sslmode"] == "require"
    assert options["options"].startswith("-c statement_timeout=9s -c search_path=beat ")


@pytest.mark.parametrize(
    "url", ["", "secret-word", "mysql://ada:secret-word@h/d", "postgresql://ada:secret-word@h:port/d"]
)
def test_an_unusable_database_url_is_refused_and_its_password_kept(url: str) -> None:
    with pytest.raises(ImproperlyConfigured) as refusal:
        database({"BYRD_DATABASE_URL": url})
    assert "BYRD_DATABASE_URL" in str(refusal.value)
    assert "secret-word" not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_secret_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: secret_key(state, {}), range(32)))
    assert len(keys) == 1
    assert len(keys.pop()) >= 50
    assert [path.name for path in state.iterdir()] == ["secret_key"]
    assert stat.S_IMODE((state / "secret_key").stat().st_mode) == 0o600


def test_a_secret_key_of_the_environment_comes_first(tmp_path: Path) -> None:
    assert secret_key(tmp_path, {"BYRD_SECRET_KEY": "given"}) == "given"
    assert not list(tmp_path.iterdir())


def test_no_place_for_a_secret_key_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImproperlyConfigured, match="Set BYRD_SECRET_KEY, or set BYRD_STATE_DIR"):
        secret_key(tmp_path / "file" / "state", {})


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("", False), ("0", False), ("No", False)])
def test_a_switch_understands_words(value: str, expected: bool) -> None:
    assert switch("BYRD_DEBUG", {"BYRD_DEBUG": value}) is expected


def test_a_list_is_split_at_commas() -> None:
    assert listed("HOSTS", "a, b,,", {}) == ["a", "b"]
    assert listed("HOSTS", "a", {"HOSTS": "c"}) == ["c"]
