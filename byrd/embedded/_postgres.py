"""The embedded Postgres server."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from byrd.embedded._binaries import Binary, find_postgres
from byrd.embedded._cache import cached, flock_within, remove_leftovers
from byrd.embedded._process import HOST, works_in
from byrd.embedded._server import EmbeddedServer
from byrd.embedded._user import ServerUser, give, reaches, run_as
from byrd.errors import EmbeddedServerError

StopMode = Literal["fast", "immediate"]

_ROLE = "byrd"
_DATABASE = "postgres"
_PASSWORD_FILE = "byrd-password"  # noqa: S105 - a file's name; in the cluster's folder, so that both appear together
_STAGING = "new-postgres-"
# `trust` is initdb's only choice without a password, and gone before the first server runs.
_INITDB_OPTIONS = ("-U", _ROLE, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
_TEMPLATE_LAYOUT = "1"  # raise it when an empty cluster is made in another way

# Any local user can reach a loopback port, so none is let in without the password.
_HBA = f"""\
# Written by Byrd.
host all         all {HOST}/32 scram-sha-256
host replication all {HOST}/32 scram-sha-256
"""

_OWN_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "logging_collector": "off",
    "log_destination": "stderr",
}
_DEFAULT_SETTINGS = {
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "dynamic_shared_memory_type": "mmap",  # in the data folder: a killed server leaves nothing in /dev/shm
}
_IN_MEMORY_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
_REFUSED_SETTINGS = frozenset({*_OWN_SETTINGS, "port", "data_directory", "config_file", "hba_file", "ident_file"})


class EmbeddedPostgres(EmbeddedServer):
    """Postgres on the loopback address, with the superuser ``byrd`` and the empty database ``postgres``.

    Args:
        data_dir: kept for the next start; None means a temporary folder, removed at the end.
        port: None means a free one, which stays the same for every start of this object.
        template: the data folder of another, stopped `EmbeddedPostgres`, that a new data folder starts as a copy of.
        settings: server settings beside the defaults (``max_connections`` 200, ``fsync`` on).
        in_memory: put the temporary folder into memory, where the system has room there, and spare the disk: about
            20 times faster at what makes many files. A killed server still loses nothing, a machine all.

    """

    kind = "postgres"
    label = "Postgres"
    _stop_signal = signal.SIGINT

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        port: int | None = None,
        template: Path | None = None,
        settings: Mapping[str, str] | None = None,
        in_memory: bool = False,
    ) -> None:
        if refused := _REFUSED_SETTINGS & {name.lower() for name in settings or {}}:
            raise EmbeddedServerError(f"These settings belong to the launcher: {', '.join(sorted(refused))}.")
        super().__init__(data_dir, port=port, in_memory=in_memory)
        self._template = template
        self._settings = {**_DEFAULT_SETTINGS, **(_IN_MEMORY_SETTINGS if in_memory else {}), **(settings or {})}
        self._binary: Binary | None = None
        self._password = ""

    @property
    def url(self) -> str:
        """``postgresql://role:password@host:port/database``, for libpq and everything built on it."""
        return f"postgresql://{_ROLE}:{self._password}@{HOST}:{self.port}/{_DATABASE}"

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server: ``fast`` writes a checkpoint first, ``immediate`` leaves recovery to the next start."""
        fast = ((signal.SIGINT, 30.0),) if mode == "fast" else ()
        self._stop(*fast, (signal.SIGQUIT, 10.0))

    def restart(self, mode: StopMode = "fast") -> Self:
        """Stop the server and start it again on the same port."""
        self.stop(mode)
        return self.start()

    def _prepare(self) -> None:
        binary = self._binary = self._binary or find_postgres(self._user)
        if not (self._store / "PG_VERSION").exists():
            self._create_cluster(binary)
        _check_version(self._store, binary)
        _clear_stale_pid(self._store)
        self._password = (self._store / _PASSWORD_FILE).read_text().strip()

    def _command(self, port: int) -> Sequence[str | Path]:
        if self._binary is None:
            raise AssertionError("_prepare comes first")
        settings = {**self._settings, **_OWN_SETTINGS, "port": str(port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._binary.path, "-D", self._store, *options]

    def _answers(self, pid: int, port: int) -> bool:
        import psycopg2

        try:
            lines = (self._store / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[0] != str(pid) or lines[7].strip() != "ready":
            return False
        try:
            psycopg2.connect(
                host=HOST,
                port=port,
                user=_ROLE,
                password=self._password,
                dbname=_DATABASE,
                connect_timeout=5,
                sslmode="disable",
            ).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _create_cluster(self, binary: Binary) -> None:
        """Make the cluster aside and rename it into place, so that a killed start leaves no half of one."""
        if (self.data_dir / "PG_VERSION").exists():
            raise EmbeddedServerError(f"{self.data_dir} is itself a Postgres data folder: choose the one above it.")
        remove_leftovers(self.data_dir, _STAGING)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.data_dir))
        if self._template is not None:
            _copy_stopped(self._template, staging, binary)
            give(staging, self._user)
        elif empty := _empty_cluster(binary, self._user):
            _copy(empty, staging)
            give(staging, self._user)
        else:
            give(staging, self._user)
            _run(self._user, binary.sibling("initdb"), "-D", staging, *_INITDB_OPTIONS)
        password = secrets.token_urlsafe(24)
        _write(staging / "pg_hba.conf", _HBA, self._user)
        _write(staging / _PASSWORD_FILE, f"{password}\n", self._user)
        _execute_offline(staging, f"ALTER ROLE {_ROLE} PASSWORD '{password}';", binary, self._user)
        if self._given_dir is not None:  # a temporary cluster need not outlive the machine
            _run(self._user, binary.sibling("initdb"), "-S", "-D", staging)
        staging.rename(self._store)
        _sync_folder(self.data_dir)


def _empty_cluster(binary: Binary, user: ServerUser | None) -> Path | None:
    """Return a new cluster that was made earlier, which is faster to copy than to make; None if none can be kept."""

    def build(staging: Path) -> None:
        if not reaches(user, staging.parent):
            raise PermissionError(f"{staging.parent} cannot be entered.")
        give(staging, user)
        _run(user, binary.sibling("initdb"), "-D", staging, *_INITDB_OPTIONS)
        _run(user, binary.sibling("initdb"), "-S", "-D", staging)
        if user is not None:
            give(staging, ServerUser("root", 0, 0))

    try:
        return cached(f"cluster-{_TEMPLATE_LAYOUT}-{binary.major}-{binary.fingerprint}", build)
    except OSError:
        return None


def _execute_offline(folder: Path, statement: str, binary: Binary, user: ServerUser | None) -> None:
    """Execute one line of SQL in a cluster without a server that others could reach."""
    quiet = ("-c", "exit_on_error=on", "-c", "log_min_error_statement=panic")  # the statement may hold a password
    _run(user, binary.path, "--single", "-c", "fsync=off", *quiet, "-D", folder, "template1", stdin=f"{statement}\n")


def _run(user: ServerUser | None, *command: str | Path, stdin: str = "") -> None:
    ran = run_as(user, command, stdin=stdin)
    if ran.returncode != 0:
        raise EmbeddedServerError(f"{command[0]} failed (exit status {ran.returncode}): {ran.stderr.strip()[-2000:]}")


def _copy_stopped(data_dir: Path, target: Path, binary: Binary) -> None:
    source = data_dir / EmbeddedPostgres.kind
    if not (source / "PG_VERSION").exists():
        raise EmbeddedServerError(f"The template {data_dir} holds no embedded Postgres: start one there first.")
    _check_version(source, binary)
    log = os.open(data_dir / f"{EmbeddedPostgres.kind}.log", os.O_RDWR)  # a running server holds its lock
    try:
        if not flock_within(log, 0):
            raise EmbeddedServerError(f"The template {data_dir} is running: stop it before it is copied.")
        _copy(source, target)
    finally:
        os.close(log)


def _copy(source: Path, target: Path) -> None:
    leave_out = shutil.ignore_patterns("postmaster.pid", "postmaster.opts")
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=leave_out)


def _check_version(cluster: Path, binary: Binary) -> None:
    major = (cluster / "PG_VERSION").read_text().strip()
    if major != binary.major:
        raise EmbeddedServerError(
            f"{cluster} holds data of Postgres {major}, and {binary.path} is Postgres {binary.major}: choose another "
            f"data folder, or set BYRD_POSTGRES_BIN to the folder of a Postgres {major}."
        )


def _clear_stale_pid(cluster: Path) -> None:
    """Remove the pid file of a server that was killed: the pid may be another program's by now, and Postgres waver."""
    pid_file = cluster / "postmaster.pid"
    try:
        first_line = pid_file.read_text().partition("\n")[0].strip()
    except FileNotFoundError:
        return
    if first_line.isdigit() and works_in(int(first_line), cluster):
        raise EmbeddedServerError(f"Process {first_line} already serves {cluster}: stop it first.")
    pid_file.unlink()


def _write(path: Path, text: str, user: ServerUser | None) -> None:
    path.write_text(text)
    path.chmod(0o600)
    give(path, user)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
