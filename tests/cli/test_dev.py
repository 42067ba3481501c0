"""`byrd dev`: servers and processes that start together and end together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from byrd.cli.processes import Entry, chosen, read_procfile
from byrd.errors import ConfigurationError
from tests.cluster import ROOT, wait_until

BYRD = [sys.executable, "-c", "from byrd.cli import main; main()"]


class Dev:
    """A running `byrd dev`."""

    def __init__(self, folder: Path, env: dict[str, str], *options: str) -> None:
        self.log = folder / "dev.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*BYRD, "dev", *options], cwd=folder, env=env, stdout=log, stderr=log)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        def match() -> re.Match[str] | None:
            found = re.search(pattern, self.text, re.MULTILINE)
            assert found or self.process.poll() is None, self.text
            return found

        return wait_until(match, timeout=timeout, what=lambda: f"{pattern} in\n{self.text}")

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


Start = Callable[..., Dev]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the embedded servers' user can reach, unlike pytest's own, if the tests run as root."""
    path = Path(tempfile.mkdtemp(prefix="byrd-dev-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Start `byrd dev` with a Procfile; what is left at the end is killed."""
    started: list[Dev] = []

    def dev(procfile: str | None, *options: str, **env: str) -> Dev:
        if procfile is not None:
            (folder / "Procfile").write_text(procfile)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("BYRD_")}
        path = os.pathsep.join([str(ROOT), str(folder)])
        started.append(Dev(folder, {**plain, "PYTHONPATH": path, **env}, *options))
        return started[-1]

    yield dev
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            try:
                one.process.wait(30)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


@pytest.fixture
def on_servers(start: Start, database_url: str, broker_url: str) -> Start:
    """The same on servers that are there."""
    return lambda procfile, *options, **env: start(
        procfile, *options, BYRD_DATABASE_URL=database_url, BYRD_BROKER_URL=broker_url, **env
    )


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_servers_worker_and_data_that_stays(start: Start, folder: Path) -> None:
    (folder / "shop.py").write_text(
        "from celery import Celery\nimport byrd\napp = Celery('shop')\nengine = byrd.Byrd(app)\n"
        "@app.task\ndef double(x): return 2 * x\n"
    )
    dev = start("worker: celery -A shop worker --pool solo --loglevel INFO\nweb: sleep 1000\n", "--only", "worker")
    dev.wait_for(r"^worker │ .* ready\.")
    assert "Byrd's tables are at version" in dev.text
    assert "web" not in dev.text
    env = folder / ".byrd" / "env"
    assert env.stat().st_mode & 0o777 == 0o600
    assert "BYRD_APP=shop" in env.read_text()
    password = re.search(r"://byrd:([^@]+)@", env.read_text())
    assert password is not None
    assert password[1] not in dev.text

    # Another terminal in the same folder finds servers and app.
    assert byrd(folder, "submit", "shop.double", "21", "--wait") == "42\n"
    assert dev.interrupt() == 0
    assert "Stopping worker within" in dev.text
    assert dev.text.rstrip().endswith("Everything has ended.")
    assert not env.exists()

    again = start("sleeper: sleep 1000\n", "--json")
    events = wait_until(lambda: [e for e in map(json.loads, again.text.splitlines()) if e["event"] == "starting"])
    assert events[0]["processes"] == ["sleeper"]
    assert [run["status"] for run in json.loads(byrd(folder, "runs", "--json"))["runs"]] == ["succeeded"]
    assert again.interrupt(signal.SIGTERM) == 0
    assert [json.loads(line)["event"] for line in again.text.splitlines()][-3:] == ["stopping", "ended", "note"]


def byrd(folder: Path, *args: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("BYRD_")}
    done = subprocess.run(
        [*BYRD, *args], cwd=folder, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_end_for_all_children_included(on_servers: Start) -> None:
    children = "for i in 1 2; do sleep 1000 & echo child $! of mine; done; wait"
    dev = on_servers(
        f"parent: {children}\nlone: echo lone $$ is here && exec sleep 1000\nred: echo '[red]x[/]'; exec sleep 1000\n"
    )
    dev.wait_for(r"^red    │ \[red\]x\[/\]$")
    wait_until(lambda: len(re.findall(r"child (\d+) of mine", dev.text)) == 2, what="two children")
    pids = [int(pid) for pid in re.findall(r"child (\d+) of mine", dev.text)]
    pids.append(int(dev.wait_for(r"lone (\d+) is here")[1]))
    assert not any(map(gone, pids))
    assert dev.interrupt() == 0
    wait_until(lambda: all(map(gone, pids)), what="the end of all children")


def test_without_a_procfile_it_runs_a_worker_of_the_app(on_servers: Start) -> None:
    dev = on_servers(None, BYRD_APP="tests.apps.basic")
    dev.wait_for(r"^worker │ .* ready\.")
    assert dev.interrupt() == 0


def test_the_exit_status_of_the_one_that_died(on_servers: Start) -> None:
    dev = on_servers("sleeper: sleep 1000\nshort: echo 'bye bye'; exit 7\n")
    assert dev.process.wait(60) == 7
    assert "short   │ bye bye\n" in dev.text
    assert "short   │ ended with status 7\n" in dev.text
    assert "Stopping sleeper within" in dev.text


def test_a_second_ctrl_c_ends_at_once(on_servers: Start) -> None:
    dev = on_servers("stubborn: trap '' TERM; echo I stay; while true; do sleep 0.1; done\n")
    dev.wait_for(r"^stubborn │ I stay")
    dev.process.send_signal(signal.SIGINT)
    dev.wait_for(r"Stopping stubborn within 15 s; Ctrl-C \(again\) ends all at once\.")
    assert dev.interrupt() == 0
    assert "stubborn │ ended with status 137" in dev.text


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "names no processes"),
        ("# only this\n\n", "names no processes"),
        ("worker celery\n", r"line 1: expected `name: command`, found 'worker celery'"),
        (None, "cannot be read"),
    ],
)
def test_a_procfile_that_cannot_be_used(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "Procfile"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        read_procfile(path)


def test_only_some_processes(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text("# all\nweb: run it\nworker:   celery -A x worker\n")
    entries = read_procfile(tmp_path / "Procfile")
    assert entries == [Entry("web", "run it"), Entry("worker", "celery -A x worker")]
    assert chosen(entries, []) == entries
    assert chosen(entries, ["worker"]) == [entries[1]]
    with pytest.raises(ConfigurationError, match="has no flower; it has web, worker"):
        chosen(entries, ["flower"])
