"""Who runs a server: ourselves, or, when we are root, a user without privileges (Postgres refuses root)."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byrd.errors import EmbeddedServerError

_CANDIDATES = ("postgres", "_postgres", "nobody")


@dataclass(frozen=True)
class ServerUser:
    """The user that root hands a server to."""

    name: str
    uid: int
    gid: int


def server_user(store: Path | None = None) -> ServerUser | None:
    """Return the user to run a server as; None means ourselves.

    A `store` that exists goes on with the user that owns it.
    """
    if os.geteuid() != 0:
        return None
    if store is not None and store.exists() and (owner := store.stat()).st_uid != 0:
        return ServerUser(_name_of(owner.st_uid), owner.st_uid, owner.st_gid)
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServerUser(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerError(
        f"Postgres does not run as root, and none of the users {', '.join(_CANDIDATES)} exists here: "
        "create one of them, or run as an ordinary user."
    )


def popen_options(user: ServerUser | None) -> dict[str, Any]:
    """Keyword arguments with which `subprocess` starts a program as `user`, in an environment that tells it nothing."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TZDIR") if name in os.environ}
    # LC_ALL: on macOS Postgres does not start without a locale, and we read its messages.
    options: dict[str, Any] = {"cwd": "/", "umask": 0o077, "env": {"PATH": os.defpath, **kept, "LC_ALL": "C"}}
    if user is not None:
        options |= {"user": user.uid, "group": user.gid, "extra_groups": []}
    return options


def run_as(
    user: ServerUser | None, command: Sequence[str | Path], *, stdin: str = "", timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a short program as `user` to its end and return what it printed; raise OSError if it cannot be run."""
    try:
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, **popen_options(user)
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddedServerError(f"{Path(command[0]).name} did not end within {timeout:g} seconds.") from error


def reaches(user: ServerUser | None, folder: Path) -> bool:
    """Tell whether `user` can enter `folder`, which takes the right to pass through every folder above it."""
    return user is None or run_as(user, ["/bin/sh", "-c", 'cd -- "$1"', "sh", folder]).returncode == 0


def give(folder: Path, user: ServerUser | None) -> None:
    """Make `user` the owner of `folder` and all within; a no-op for ourselves."""
    if user is None:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.lchown(os.path.join(parent, name), user.uid, user.gid)  # noqa: PTH118 - 1,000 files: no Path for each
    os.lchown(folder, user.uid, user.gid)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
