"""The module that a benchmarked worker loads: ``celery -A benchmarks.worker worker``."""

from __future__ import annotations

import functools
import os
import signal
import threading
from typing import Any

import redis
from celery.signals import task_postrun, worker_ready

from benchmarks.engines import ENDED, READY, Engine

engine = Engine.from_environment()
app = engine.make_app()
app.finalize()


@functools.cache
def _redis() -> redis.Redis:
    """The connection of this pool process: first used after the fork."""
    return redis.Redis.from_url(engine.redis_url)


def _ended(**_: Any) -> None:
    _redis().incr(ENDED)


def _ready(**_: Any) -> None:
    with redis.Redis.from_url(engine.redis_url) as client:
        client.set(READY, 1)


def _end_with_parent() -> None:
    """Wait on the pipe whose other end the benchmark holds: it breaks when the benchmark ends, however that comes."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


# Celery sends this signal once the outcome has been stored, in all three engines.
task_postrun.connect(_ended, sender=app.tasks["benchmarks.last"], weak=False)
worker_ready.connect(_ready, weak=False)
threading.Thread(target=_end_with_parent, name="benchmarks-leash", daemon=True).start()
