"""The module that a worker of Celery's or Byrd's loads: ``celery -A benchmarks.peers.celery_worker worker``."""

from __future__ import annotations

import functools
from typing import Any

import redis
from celery.signals import task_postrun

from benchmarks.peers import celery as plain
from benchmarks.peers.protocol import Config

config = Config.from_environment()
if config.options["results"] == "byrd":
    from benchmarks.peers import byrd as durable

    app = durable.make_app(config)
else:
    app = plain.make_app(config)

    @functools.cache
    def _counts() -> redis.Redis:
        """The connection of this pool process: first used after the fork."""
        return redis.Redis.from_url(config.redis_database(plain.COUNTS))

    def _ended(**_: Any) -> None:
        _counts().incr(plain.ENDED)

    app.finalize()
    task_postrun.connect(_ended, sender=app.tasks["benchmarks.last"], weak=False)
