"""Repairs below Celery: a worker outlives an outage of its broker, comes back soon, and does not block under gevent."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from celery import Celery
from kombu.transport import virtual

log = logging.getLogger(__name__)

#: The pauses between tries to reach a broker that is away: each a little longer than the one before, up to a limit.
_RECONNECT = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}
#: How often a worker complains of the same thing.
_COMPLAIN_SECONDS = 10.0


def tolerate_outages() -> None:
    """Keep a worker alive whose Redis goes away, or refuses to write, while it holds or takes a message.

    With Celery and kombu 5.7.0 such a worker exits with code 1: closing the lost channel restores or
    acknowledges the message on it, which fails.  The message is left to the broker's visibility time-out; a
    step's message is only a wake-up, sent again by the relay.

    A Redis that is out of memory still hands out messages, and then refuses to note who has them.  The message is
    in nobody's hands but the worker's by then, so it is run; and that is what makes room in Redis.
    """
    try:
        from kombu.transport import redis as transport
    except ImportError:
        return
    if not getattr(transport.Channel.QoS, "byrd_tolerant", False):
        transport.Channel.QoS = _tolerant(transport.Channel.QoS)


def _tolerant(plain: Any) -> Any:
    """Return kombu's book of unacknowledged messages, made to bear that it cannot be written."""

    class TolerantQoS(plain):
        byrd_tolerant = True
        complained = -_COMPLAIN_SECONDS

        def append(self, message: Any, delivery_tag: Any) -> None:
            try:
                super().append(message, delivery_tag)
            except Exception as exc:  # noqa: BLE001 - whatever Redis refuses with
                if time.monotonic() - self.complained > _COMPLAIN_SECONDS:
                    self.complained = time.monotonic()
                    log.warning("the broker does not note which messages this worker has taken: %r", exc)
                virtual.QoS.append(self, message, delivery_tag)

        def restore_unacked(self, client: Any = None) -> None:
            try:
                super().restore_unacked(client)
            except Exception as exc:  # noqa: BLE001 - whatever a closed channel raises
                log.warning("%d messages stay unacknowledged in the broker: %r", len(self._delivered), exc)
                self._delivered.clear()

        def ack(self, delivery_tag: Any) -> None:
            try:
                super().ack(delivery_tag)
            except Exception as exc:  # noqa: BLE001 - whatever a closed channel raises
                self._leave(delivery_tag, exc)

        def reject(self, delivery_tag: Any, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - kombu's signature
            try:
                super().reject(delivery_tag, requeue=requeue)
            except Exception as exc:  # noqa: BLE001 - whatever a closed channel raises
                self._leave(delivery_tag, exc)

        def _leave(self, delivery_tag: Any, exc: Exception) -> None:
            log.warning("message %s stays unacknowledged in the broker: %r", delivery_tag, exc)
            self._quick_ack(delivery_tag)

    return TolerantQoS


def reconnect_soon(app: Celery) -> None:
    """Have a worker look each two seconds whether its broker is back.

    Celery's consumer has no setting for it: its pauses grow to 30 s, so after an outage of half a minute it may be
    another ten seconds until it takes messages again.
    """
    plain = app.amqp.Connection

    class PromptConnection(plain):  # type: ignore[misc, valid-type]
        def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
            return super().ensure_connection(*args, **{**(_RECONNECT if len(args) <= 2 else {}), **kwargs})

    app.amqp.Connection = PromptConnection


def cooperate_with_gevent() -> None:
    """Let psycopg2 yield to other greenlets while it waits, in a process that gevent has patched."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("socket"):
        return
    from gevent.socket import wait_read, wait_write
    from psycopg2 import extensions

    def wait(connection: Any, timeout: float | None = None) -> None:
        while True:
            state = connection.poll()
            if state == extensions.POLL_OK:
                return
            if state == extensions.POLL_READ:
                wait_read(connection.fileno(), timeout=timeout)
            elif state == extensions.POLL_WRITE:
                wait_write(connection.fileno(), timeout=timeout)
            else:
                raise extensions.QueryCanceledError("bad state from poll")

    extensions.set_wait_callback(wait)
