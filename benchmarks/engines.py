"""The engines that are compared, each in the best set-up that is fair: ``benchmarks/README.md`` says why it is that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine.

    ``module``: of ``benchmarks.peers``.  ``environment``: names its requirements; None: Byrd's own environment.
    ``python``: the oldest that it runs on.  ``needs``: the option without which it is left out.
    ``quick``: part of ``--quick``, as a figure is measured against it.
    ``drain``: how many one-step runs are submitted before and then drained; some seconds' worth.
    ``options``: what the peer's module reads.
    """

    name: str
    title: str
    module: str
    drain: int
    environment: str | None = None
    python: tuple[int, int] = (3, 11)
    needs: str | None = None
    quick: bool = True
    options: Mapping[str, object] = field(default_factory=dict)


BYRD, CELERY, FLOOR = "byrd", "celery-redis", "floor"

_ALL = (
    Engine(CELERY, "Celery, Redis results", "celery", 4000, options={"results": "redis"}),
    Engine("celery-postgres", "Celery, Postgres results", "celery", 2000, options={"results": "postgres"}),
    Engine(
        "celery-acks-late",
        "Celery, acks_late",
        "celery",
        4000,
        quick=False,
        options={"results": "redis", "acks_late": True},
    ),
    Engine(
        "celery-solo", "Celery, solo workers", "celery", 6000, quick=False, options={"results": "redis", "pool": "solo"}
    ),
    Engine("dramatiq", "dramatiq, not durable", "dramatiq", 8000, "dramatiq", quick=False),
    Engine("dbos", "DBOS, queue", "dbos", 1500, "dbos"),
    Engine("absurd", "absurd", "absurd", 3000, "absurd", needs="--absurd-sql"),
    Engine("oban", "oban-py", "oban", 20_000, "oban", python=(3, 12)),
    Engine("procrastinate", "Procrastinate", "procrastinate", 1500, "procrastinate", quick=False),
    Engine(FLOOR, "SQL floor", "floor", 12_000),
    Engine(BYRD, "Byrd", "byrd", 6000, options={"results": "byrd"}),
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ALL}
