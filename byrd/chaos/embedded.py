"""Servers, an app and workers of chaos's own, in a temporary folder: for ``byrd chaos --embedded``."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from byrd import embedded, store
from byrd.chaos.session import Options
from byrd.chaos.targets import EmbeddedServer, OwnWorkers, Server
from byrd.engine import Byrd

APP = "byrd.chaos.app"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a session needs that has nothing to do with anybody else's servers."""

    engine: Byrd
    own: OwnWorkers
    redis_server: Server
    postgres_server: Server


def with_all_faults(options: Options) -> Options:
    """Return the options with every kind of fault enabled."""
    return replace(
        options,
        workers=options.workers or 2,
        pause_workers=True,
        flush_redis=True,
        drop=options.drop or 0.02,
        duplicate=options.duplicate or 0.05,
        embedded=True,
    )


@contextlib.contextmanager
def surroundings(options: Options, folder: Path) -> Iterator[Surroundings]:
    """Start both servers and make the app; the workers are the session's to start."""
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(embedded.postgres())
        # Nothing on disk: after a stop it is empty, which is the worst that Redis can do.
        valkey = stack.enter_context(embedded.valkey(persistence=False))
        store.migrate(postgres.url)
        env = {"BYRD_DATABASE_URL": postgres.url, "BYRD_BROKER_URL": valkey.url}
        stack.enter_context(_environment(env))
        engine: Byrd = importlib.import_module(APP).engine
        stack.callback(engine.close)
        yield Surroundings(
            engine=engine,
            own=OwnWorkers(APP, options.workers, concurrency=options.concurrency, folder=folder, env=os.environ),
            redis_server=EmbeddedServer(lambda hard: valkey.kill() if hard else valkey.stop(), valkey.start),
            postgres_server=EmbeddedServer(lambda hard: postgres.stop("immediate" if hard else "fast"), postgres.start),
        )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Name the servers in the environment, where the app and the workers look."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
