"""The command line in this process, on a test's own cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from byrd.cli import main
from tests.cluster import Cluster

APP = "tests.cli.shop"


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(*args: str) -> Answer:
    """Call ``byrd`` with these arguments."""
    result = CliRunner().invoke(main, args, prog_name="byrd")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


Cli = Callable[..., Answer]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of the test's own to be in, and an environment that names no servers and no app."""
    for name in ("BYRD_DATABASE_URL", "BYRD_BROKER_URL", "BYRD_APP", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def byrd_cli(cluster: Cluster, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Call ``byrd -A tests.cli.shop`` on the test's cluster."""
    return cli_on(cluster, monkeypatch)


@pytest.fixture
def shared_cli(module_cluster: Cluster, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The same on the cluster that a module's tests share."""
    return cli_on(module_cluster, monkeypatch)


def cli_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Call ``byrd -A tests.cli.shop`` on a cluster."""
    monkeypatch.setenv("BYRD_DATABASE_URL", cluster.database_url)
    monkeypatch.setenv("BYRD_BROKER_URL", cluster.broker_url)
    # Another test's cluster may have imported the module for itself meanwhile.
    monkeypatch.setitem(sys.modules, APP, cluster.app(APP))
    return lambda *args: call("-A", f"{APP}:app", *args)
