"""What a worker does with a message of which it can make nothing: logs it, drops it, and goes on.

With Celery and kombu 5.7 an entry of a queue that is no JSON, or whose parts are of other types than Celery writes,
ends the worker, and the next one takes the next such entry.  A step whose task this worker does not have is sent again.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery import bootsteps
from celery.exceptions import InvalidTaskError

from byrd.store import sweeps
from byrd.task.attempt import readable_header
from byrd.task.runtime import runtime_of

log = logging.getLogger(__name__)

#: What a message has to bring for kombu to deliver it, and to restore it when it comes back unacknowledged.
_DELIVERY = ("exchange", "routing_key")
_DROPPED = "an entry of a queue was dropped, for it is no message: %s"


class UnreadableMessageError(ValueError):
    """An entry of a queue is no message."""


class CarefulStep(bootsteps.StartStopStep):
    """Looks at each message before and after Celery does, so that none ends the consumer or is lost to its step."""

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        plain = consumer.create_task_handler

        def create_task_handler(*args: Any, **kwargs: Any) -> Callable[[Any], None]:
            return functools.partial(_received, consumer, plain(*args, **kwargs))

        consumer.create_task_handler = create_task_handler


def _received(consumer: Any, handler: Callable[[Any], None], message: Any) -> None:
    try:
        if not _passed_on(consumer, message):
            handler(message)
    except Exception as exc:
        # kombu counts KeyError among Redis' connection errors, but here it is a header that is missing.
        lost = (*consumer.connection_errors, *consumer.channel_errors)
        if isinstance(exc, MemoryError) or (isinstance(exc, lost) and not isinstance(exc, KeyError)):
            raise
        log.critical("a message was dropped, for nothing can be made of it: %r", exc, exc_info=exc)
        if not message.acknowledged:
            message.reject_log_error(log, consumer.connection_errors)


def _passed_on(consumer: Any, message: Any) -> bool:
    """Have a step whose task is not registered here sent again soon: in a rolling deploy others have it.

    Celery would record the failure of a task that it has never heard of, and the step wait for the relay's patience.
    """
    headers = message.headers or {}
    task, step = headers.get("task"), readable_header(headers.get("byrd"))
    if step is None or not isinstance(task, str) or task in consumer.app.tasks:
        return False
    log.error(
        "Received unregistered task of type %r: step %s is sent again, for a worker that has it", task, step["step"]
    )
    runtime_of(consumer.app).later(sweeps.pass_on, step["step"], step["attempt"])
    message.ack_log_error(log, consumer.connection_errors)
    return True


def check_request(headers: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidTaskError` for headers that would break the worker later, in its pool or its event loop."""
    limits = headers.get("timelimit")
    wrong = next((name for name in ("id", "task") if not isinstance(headers.get(name), str)), None)
    if limits is not None and not _are_limits(limits):
        wrong = "timelimit"
    if not isinstance(headers.get("stamped_headers") or [], list) or not isinstance(headers.get("stamps") or {}, dict):
        wrong = "stamps"
    if wrong:
        raise InvalidTaskError(f"its header {wrong!r} is of no use: {headers.get(wrong)!r:.100}")


def _are_limits(limits: Any) -> bool:
    return (
        isinstance(limits, list | tuple)
        and len(limits) == 2
        and all(limit is None or (isinstance(limit, int | float) and limit >= 0) for limit in limits)
    )


def survive_garbage() -> None:
    """Have kombu's Redis transport drop what is no message, for whatever can reach a queue can write to it."""
    try:
        from kombu.transport import redis as transport
    except ImportError:
        return
    channel: Any = transport.Channel
    plain_message, plain_read = channel.Message, channel._brpop_read  # noqa: SLF001 - no hook comes before it
    if getattr(plain_message, "byrd_checked", False):
        return

    class CheckedMessage(plain_message):  # type: ignore[misc, valid-type]
        byrd_checked = True

        def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
            _check_payload(payload)
            try:
                super().__init__(payload, channel=channel, **kwargs)
            except Exception as exc:
                raise UnreadableMessageError(f"its body cannot be read: {exc!r}") from exc

    @functools.wraps(plain_read)
    def read(self: Any, **options: Any) -> Any:
        try:
            return plain_read(self, **options)
        except (UnreadableMessageError, json.JSONDecodeError, UnicodeDecodeError) as exc:
            log.critical(_DROPPED, exc)
            return True

    channel.Message = CheckedMessage
    channel._brpop_read = read  # noqa: SLF001


def _check_payload(payload: Any) -> None:
    properties = payload.get("properties") if isinstance(payload, dict) else None
    info = properties.get("delivery_info") if isinstance(properties, dict) else None
    if not isinstance(info, dict) or not all(name in info for name in _DELIVERY):
        raise UnreadableMessageError("it does not say how it was delivered")
    if not isinstance(properties.get("delivery_tag"), str) or not isinstance(payload.get("headers"), dict):  # type: ignore[union-attr]
        raise UnreadableMessageError("it has no delivery tag or no headers")
