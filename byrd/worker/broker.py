"""Two repairs below Celery, so that a worker outlives an outage of Redis and a gevent worker does not block."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


def tolerate_outages() -> None:
    """Keep a worker alive whose Redis goes away while it holds a message that it has not acknowledged.

    With Celery and kombu 5.7.0 such a worker exits with code 1: closing the lost channel restores or
    acknowledges the message on it, which fails.  The message is left to the broker's visibility time-out; a
    step's message is only a wake-up, sent again by the relay.
    """
    try:
        from kombu.transport import redis as transport
    except ImportError:
        return
    plain = transport.Channel.QoS
    if getattr(plain, "byrd_tolerant", False):
        return

    class TolerantQoS(plain):  # type: ignore[misc, valid-type]
        byrd_tolerant = True

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

    transport.Channel.QoS = TolerantQoS


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
