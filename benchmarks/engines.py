"""The engines that are compared: one small Celery app each, alike but for where results go and who drives them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from celery import Celery, chain, chord
from celery.result import GroupResult
from sqlalchemy import make_url

import byrd

#: What a workload consists of.
CHAIN_LENGTH = 10
CHORD_WIDTH = 100

#: How an engine's worker learns which one it is.
_VARIABLE = "BENCHMARKS_ENGINE"
#: In the engine's own Redis database: how many canvases have ended, and whether the worker consumes.
ENDED, READY = "benchmarks:ended", "benchmarks:ready"


class EngineName(StrEnum):
    """The engines; the others are compared with the first."""

    CELERY_REDIS = "celery-redis"
    CELERY_POSTGRES = "celery-postgres"
    BYRD = "byrd"


class Workload(StrEnum):
    """What is measured."""

    CHAINS = "chains"
    CHORDS = "chords"

    @property
    def steps(self) -> int:
        """The tasks in one canvas; a chord's body is one of them."""
        return CHAIN_LENGTH if self is Workload.CHAINS else CHORD_WIDTH + 1

    @property
    def label(self) -> str:
        """What one canvas is."""
        return f"chains of {CHAIN_LENGTH}" if self is Workload.CHAINS else f"chords of {CHORD_WIDTH}"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: a Redis database and a Postgres database of its own, on servers that all share."""

    name: EngineName
    redis_url: str
    postgres_url: str

    @classmethod
    def from_environment(cls) -> Self:
        """Return the engine that this worker is to be."""
        found = json.loads(os.environ[_VARIABLE])
        return cls(EngineName(found["name"]), found["redis_url"], found["postgres_url"])

    def environment(self) -> dict[str, str]:
        """Return what :meth:`from_environment` reads."""
        return {_VARIABLE: json.dumps(asdict(self))}

    def make_app(self) -> Celery:
        """Return the engine's app.  Each setting that is not here is Celery's, or Byrd's, default."""
        app = Celery(f"benchmarks.{self.name}", broker=self.redis_url, set_as_current=False)
        app.conf.broker_connection_retry_on_startup = True
        add_tasks(app)
        if self.name is EngineName.CELERY_REDIS:
            app.conf.result_backend = self.redis_url
        elif self.name is EngineName.CELERY_POSTGRES:
            url = make_url(self.postgres_url).set(drivername="postgresql+psycopg2")
            app.conf.result_backend = "db+" + url.render_as_string(hide_password=False)
        else:
            byrd.Byrd(app, database_url=self.postgres_url)
        return app


def add_tasks(app: Celery) -> None:
    """Register the no-op steps; each returns what it got, so that a lost or doubled value shows in the result."""

    @app.task(name="benchmarks.step", shared=False)
    def step(value: int) -> int:
        return value

    @app.task(name="benchmarks.last", shared=False)
    def last(value: int | list[int]) -> int:
        return value if isinstance(value, int) else sum(value)


def canvas(app: Celery, workload: Workload, number: int) -> Any:
    """Return the ``number``-th canvas of a workload."""
    step, last = app.tasks["benchmarks.step"], app.tasks["benchmarks.last"]
    if workload is Workload.CHAINS:
        return chain(step.s(number), *(step.s() for _ in range(CHAIN_LENGTH - 2)), last.s())
    return chord([step.s(number) for _ in range(CHORD_WIDTH)], last.s())


def expected(workload: Workload, number: int) -> int:
    """Return the value of the ``number``-th canvas."""
    return number if workload is Workload.CHAINS else number * CHORD_WIDTH


def submitter(app: Celery) -> Callable[[Any], Any]:
    """Return what starts a canvas, and answers with something whose ``get`` returns its value."""
    engine: byrd.Byrd | None = getattr(app, "byrd", None)
    if engine is not None:
        return engine.submit
    return lambda signature: signature.apply_async()


def fetch(handle: Any, *, timeout: float) -> Any:
    """Return the value of a canvas that has ended; ``handle`` is from a :func:`submitter`."""
    value = handle.get(timeout=timeout)
    members = getattr(handle, "parent", None)
    if isinstance(members, GroupResult):  # Celery's client listens for the members of a chord until they were fetched
        members.get(timeout=timeout)
    return value
