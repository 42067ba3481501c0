"""The actors that dramatiq's workers load."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers.protocol import Config

#: The Redis databases for messages and results.
BROKER, RESULTS = 0, 1

_config = Config.from_environment()
broker = RedisBroker(url=_config.redis_database(BROKER))
broker.add_middleware(Results(backend=RedisBackend(url=_config.redis_database(RESULTS))))
dramatiq.set_broker(broker)


@dramatiq.actor
def step(value: int) -> int:
    """Return what it got, which the pipeline passes on."""
    return value


@dramatiq.actor(store_results=True)
def last(value: int) -> int:
    """Return what it got, which is the result."""
    return value
