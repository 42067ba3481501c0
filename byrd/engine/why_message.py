"""What ``byrd why`` says of the message of a ready step: sent, lost and sent again, not taken, or held back."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from byrd.engine.words import count, moment, shortened
from byrd.store import insight
from byrd.store.insight import OpenStep, Standing
from byrd.task.publisher import MOST_READ

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: A message that was published is usually taken at once; after this time it is worth a word.
_TAKEN_SECONDS = 1.0
#: A step that is due is published within a sweep; after this time something is wrong with it.
_PUBLISHED_SECONDS = 5.0


class Messages:
    """The messages of a run's ready steps.  Each queue is looked at once, however many of them wait in it."""

    def __init__(self, engine: Byrd, standing: Standing, *, ask_broker: bool) -> None:
        self._engine, self._standing = engine, standing
        self._ask_broker = ask_broker and bool(engine.app.conf.broker_url)
        self._depths: dict[str, int | str | None] = {}
        self._missing: dict[str, frozenset[str]] = {}

    def alike(self, step: OpenStep) -> tuple[object, ...]:
        """Return what the messages of steps have in common that are told of together."""
        return (step.queue, step.sends > 1, _lost_at(step) is not None, self._is_missing(step))

    def before(self, step: OpenStep) -> str:
        """Count the steps before it in its queue: a query, so it is asked for those steps only that are told of."""
        store = self._engine.runtime.store
        found = store.run(insight.steps_before, step.queue, step.ready_at) if step.ready_at else 0
        return count(found, "step") if found else ""

    def told(self, step: OpenStep, *, many: bool) -> str:
        """Say what is known of a step's message; ``many``: of the messages of several steps, this the first of them."""
        now, queue = self._standing.now, f"queue {step.queue!r}"
        its, it = ("their messages", "they") if many else ("its message", "it")
        before = self.before(step)
        behind = (f"; {before} became ready before {'them' if many else 'it'}" if before else "") + self._rate(step)
        fresh = self._is_fresh(step)
        depth = None if fresh else self._depth(step.queue)
        if isinstance(depth, str):
            sent = f"{'are' if many else 'is'} sent to {queue} once it does"
            return f"but the broker, {depth}: {its} {sent}{behind}"
        if step.sends == 0 or step.wake_at is None:
            late = step.run_at is not None and (now - step.run_at).total_seconds() > _PUBLISHED_SECONDS
            so = ", but late: see the workers' logs for what keeps their relay from it" if late else ""
            return f"and about to be published to {queue}{so}{behind}"
        at = f"at {moment(step.wake_at, now)}" if step.wake_at > now else "now"
        again = f"{'the first is' if many else 'it is'} sent again {at}{behind}"
        sent = f"{its} {'were' if many else 'was'} {_sent(step, now, many=many)} {queue}"
        if fresh:
            return f"and {sent}, about to be taken; should {it} be lost, {again}"
        if depth is None:
            return f"and {sent} without being taken: should {it} be lost, {again}"
        taken = "it was lost, or a worker that is busy or frozen took it"
        if many:
            taken = "they were lost, or workers that are busy or frozen took them"
        if depth == 0:
            return f"and {sent}, which is empty: {taken}; {again}"
        held = count(depth, "message", "messages")
        if self._is_missing(step):
            return f"and {sent}, and {'are' if many else 'is'} not among the {held} there: {taken}; {again}"
        return f"and {sent}, where {held} {'is' if depth == 1 else 'are'} not taken yet; {again}"

    def _is_fresh(self, step: OpenStep) -> bool:
        waited = (self._standing.now - step.ready_at).total_seconds() if step.ready_at else 0.0
        return step.sends == 1 and waited < _TAKEN_SECONDS

    def _depth(self, queue: str) -> int | str | None:
        """Return how many messages are in a queue, or how the broker fails to say; None where no broker is known."""
        if not self._ask_broker:
            return None
        if queue not in self._depths:
            try:
                self._depths[queue] = self._engine.runtime.publisher.count(queue)
            except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
                with self._engine.app.connection_for_write() as connection:
                    where = connection.as_uri()
                self._depths[queue] = f"{where}, does not answer here ({shortened(str(exc), 100)})"
        return self._depths[queue]

    def _is_missing(self, step: OpenStep) -> bool:
        """Tell whether a step needs a message of its own that is known not to be among those in its queue."""
        if not step.solo or step.sends == 0 or self._is_fresh(step):
            return False
        depth = self._depth(step.queue)
        if not isinstance(depth, int) or not 0 < depth <= MOST_READ:
            return False
        if step.queue not in self._missing:
            attempts = {
                one.id: one.attempt
                for one in self._standing.open_steps
                if one.status == "ready" and one.solo and one.sends > 0 and one.queue == step.queue
            }
            found = self._engine.runtime.publisher.missing(step.queue, attempts)
            self._missing[step.queue] = frozenset(found or ())
        return step.id in self._missing[step.queue]

    def _rate(self, step: OpenStep) -> str:
        """Say whether a worker may be holding the message back: Celery's rate limits are in its memory only."""
        app = self._engine.app
        limit = getattr(app.tasks.get(step.task), "rate_limit", None) or app.conf.task_default_rate_limit
        return f"; its task is limited to {limit}, so a worker may hold it back" if limit else ""


def _lost_at(step: OpenStep) -> datetime | None:
    """Return when it was found for the last time that the message was not there, and another one was sent."""
    if step.lost_at is None or step.sends < 2:
        return None
    # What was lost before it became ready again, for a retry say, is over.
    return step.lost_at if step.ready_at is None or step.lost_at >= step.ready_at else None


def _sent(step: OpenStep, now: datetime, *, many: bool) -> str:
    """Say how often a message was sent, and why."""
    if step.sends < 2 or step.sent_at is None:
        return "sent to"
    times, last, lost_at = f"{step.sends:,} times", moment(step.sent_at, now), _lost_at(step)
    if lost_at is None:
        return f"sent again (the first {times}, last at {last}) to" if many else f"sent {times} (last at {last}) to"
    if many:
        return f"lost and sent again (the first at {moment(lost_at, now)}, sent {times} so far) to"
    if lost_at == step.sent_at:
        return f"lost and sent again at {last} (sent {times} so far) to"
    return f"sent {times} (at {moment(lost_at, now)} because it was lost, last at {last}) to"
