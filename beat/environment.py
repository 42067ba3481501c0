"""What the Django settings take from the environment: the database, the secret key, lists and switches."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

# Django's tables get a schema of their own, and see no other: the database is often the one of the user's own
# application, whose `auth_user` or `django_migrations` in `public` Django would otherwise take for these.
SCHEMA = "beat"

_SERVER_OPTIONS = " ".join(
    (
        f"-c search_path={SCHEMA}",
        # A beat that freezes while it holds a schedule's row gives it up after a minute.
        "-c idle_in_transaction_session_timeout=60s",
    )
)


def database(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Django's description of the database that BYRD_DATABASE_URL names."""
    text = environ.get("BYRD_DATABASE_URL")
    if not text:
        raise ImproperlyConfigured(
            "BYRD_DATABASE_URL is not set. Set it to the database of your Byrd, as postgresql://user:password@host/name."
        )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # without its cause: that would print the password
        raise ImproperlyConfigured("BYRD_DATABASE_URL is no URL. It has to be postgresql://...") from None
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        raise ImproperlyConfigured(f"BYRD_DATABASE_URL is for {url.get_backend_name()}. It has to be postgresql://...")
    query: dict[str, Any] = {key: value if isinstance(value, str) else value[-1] for key, value in url.query.items()}
    host, port = query.pop("host", url.host), query.pop("port", url.port)
    query["options"] = f"{query.get('options', '')} {_SERVER_OPTIONS}".strip()
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.database or query.pop("dbname", ""),
        "USER": url.username or query.pop("user", ""),
        "PASSWORD": url.password or query.pop("password", ""),
        "HOST": host or "",
        "PORT": str(port or ""),
        "OPTIONS": {"connect_timeout": 5, "application_name": "byrd beat", **query},
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
    }


def secret_key(state: Path, environ: Mapping[str, str] = os.environ) -> str:
    """BYRD_SECRET_KEY, or a key that is made once and kept in the folder `state`."""
    if key := environ.get("BYRD_SECRET_KEY"):
        return key
    path = state / "secret_key"
    try:
        return path.read_text(encoding="ascii") if path.exists() else _new_secret_key(path)
    except OSError as error:
        raise ImproperlyConfigured(
            f"No secret key: {path} cannot be read or written ({error.strerror}). "
            "Set BYRD_SECRET_KEY, or set BYRD_STATE_DIR to a folder that can be written."
        ) from error


def _new_secret_key(path: Path) -> str:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    draft.touch(mode=0o600)
    draft.write_text(secrets.token_urlsafe(50), encoding="ascii")
    try:
        path.hardlink_to(draft)  # one process wins, and nobody reads half a key
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_text(encoding="ascii")


def switch(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """True if the variable is set to anything but an empty string or a word for no."""
    return environ.get(name, "").strip().lower() not in {"", "0", "no", "off", "false"}


def listed(name: str, default: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The words of a comma-separated variable."""
    return [word.strip() for word in environ.get(name, default).split(",") if word.strip()]
