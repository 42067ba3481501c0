"""Ties Byrd's threads to the life of a Celery worker."""

from __future__ import annotations

import functools
import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_init, worker_shutdown, worker_shutting_down
from celery.worker import state

from byrd.errors import ConfigurationError
from byrd.limits import limit_of
from byrd.store import limits
from byrd.task.limited import limits_of
from byrd.task.runtime import SLICE_SECONDS, runtime_of
from byrd.worker import broker, messages, remote
from byrd.worker.crier import Crier
from byrd.worker.keeper import CHILD_SECONDS, Keeper, Settings, Sweeper, has_exited

log = logging.getLogger(__name__)


class LeaseStep(bootsteps.StartStopStep):
    """Registers the worker before it consumes anything, and ends its lease after its pool has drained."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.keeper: Keeper | None = None
        self.sweeper: Sweeper | None = None
        self.crier: Crier | None = None
        self._reaping: Any = None
        self._loop_seen_at = -math.inf
        # Before the pool starts, as above.
        runtime = runtime_of(worker.app)
        runtime.slice_steps(slice_seconds_of(worker.app) if _can_slice(worker) else 0.0)

    def start(self, worker: Any) -> None:
        """Take the lease; refuse to work on a database that is not migrated."""
        app: Celery = worker.app
        runtime = runtime_of(app)
        settings = settings_of(app)
        runtime.patient_store.check_live()  # a Postgres that is away is waited for
        if declared := limits_of(app):
            runtime.patient_store.run(limits.declare, declared, anew=True)
        self.sweeper = Sweeper(runtime, settings)
        self.keeper = Keeper(
            runtime,
            settings,
            worker_id=runtime.worker_id,
            hostname=worker.hostname,
            pool=_pool_name(worker),
            concurrency=int(worker.concurrency or 0),
            queues=lambda: sorted(app.amqp.queues.consume_from),
            children=lambda: _children(worker),
            shares=lambda: _shares(app) if runtime.slice_seconds > 0 else [],
            listened=lambda: _is_listened_to(worker),
            busy=self._busy,
            publish_soon=self.sweeper.wake,
        )
        _keep_what_is_handed_over(worker)
        self.keeper.heartbeat()
        self.keeper.start()
        remote.attend(self._remotely_changed)
        self.sweeper.start()
        if _pool_name(worker) == "prefork" and runtime.slice_seconds > 0:
            self.crier = Crier(runtime)
            self.crier.start()
            runtime.cease_to_wait = self.crier.wake
        worker_shutting_down.connect(self._told_to_stop, sender=worker.hostname, weak=False)
        _wrap(worker, "wait_for_soft_shutdown", before=self._told_to_stop)  # comes before that signal does
        _wrap(worker, "terminate", after=self._shut_down)  # sends no worker_shutdown
        worker_shutdown.connect(self._shut_down, sender=worker, weak=False)

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Have the pool replace a process that has died at once; called again after each loss of the broker.

        The pool watches a pipe of each process, which the kernel closes a moment before the process can be waited for:
        a pool that is quicker than that finds nobody dead, and looks again five seconds later.
        """
        if self._reaping is not None:
            self._reaping.cancel()

        def reap() -> None:
            self._loop_seen_at = time.monotonic()
            if any(has_exited(pid) for pid in _children(worker)):
                worker.pool.maintain_pool()

        if hasattr(worker.pool, "maintain_pool"):
            self._reaping = hub.call_repeatedly(CHILD_SECONDS, reap)

    def _busy(self) -> set[int] | None:
        """Return the pool processes that have a message; None while the event loop, which is told of it, hangs."""
        if time.monotonic() - self._loop_seen_at > 2 * CHILD_SECONDS:
            return None
        return {pid for request in list(state.active_requests) if (pid := getattr(request, "worker_pid", None))}

    def stop(self, worker: Any) -> None:
        """The worker stops: its pool drains while the lease is kept."""
        if self.keeper is not None:
            self.keeper.stopping()

    def terminate(self, worker: Any) -> None:
        """The worker stops at once."""
        self.stop(worker)

    def _remotely_changed(self) -> None:
        if self.keeper is not None:
            self.keeper.changed = True

    def _told_to_stop(self, **_: Any) -> None:
        # In a signal handler, at once: the main thread of a solo pool goes on with its step for as long as that takes.
        if self.keeper is not None:
            self.keeper.told_to_stop = True
            self.keeper.runtime.stop()

    def _shut_down(self, **_: Any) -> None:
        for thread in (self.crier, self.sweeper):
            if thread is not None:
                thread.stop()
        if self.keeper is not None:
            self.keeper.release("the worker was shut down")
        self.keeper = self.sweeper = self.crier = None


def _wrap(worker: Any, name: str, *, before: Callable[[], object] = tuple, after: Callable[[], object] = tuple) -> None:
    """Have something done before or after a method of this worker."""
    plain = getattr(worker, name)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return plain(*args, **kwargs)
        finally:
            after()

    setattr(worker, name, wrapped)


def _keep_what_is_handed_over(worker: Any) -> None:
    """Have a prefork pool that stops wait for messages that a process has been handed, and has not accepted yet.

    Celery 5.7 forgets these when its consumer closes.  The process runs one nevertheless, and before it ends it waits
    for its main process to hear of that: where nobody listens any more, for half a minute.
    """
    plain: Any = getattr(worker.pool, "flush", None)
    if _pool_name(worker) != "prefork" or plain is None:
        return
    pool = worker.pool._pool  # noqa: SLF001 - neither Celery nor billiard lets one ask
    stopping: list[bool] = []
    _wrap(worker, "stop", before=lambda: stopping.append(True))

    @functools.wraps(plain)
    def flush() -> None:
        jobs = pool._cache  # noqa: SLF001
        # After the loss of a broker the loop goes on, and hears of them.
        handed = {no: job for no, job in list(jobs.items()) if stopping and _is_handed_over(job)}
        for no in handed:
            del jobs[no]
        try:
            plain()
        finally:
            jobs.update(handed)

    worker.pool.flush = flush


def _is_handed_over(job: Any) -> bool:
    """Tell whether a pool process has been sent a job, or part of it, and has not accepted it yet."""
    return job._write_to is not None and not job._accepted  # noqa: SLF001


def prepare_worker(app: Celery) -> None:
    """Have workers of this app take part: called once, by the engine."""
    app.steps["worker"].add(LeaseStep)
    app.steps["consumer"].add(messages.CarefulStep)

    def init(sender: Any = None, **_: Any) -> None:
        if sender is None or sender.app is not app:
            return
        # Before the pool starts, so that its processes are born knowing whose they are.
        runtime_of(app).become_worker(str(uuid.uuid4()))
        broker.tolerate_outages()
        messages.survive_garbage()
        broker.reconnect_soon(app)
        broker.cooperate_with_gevent()

    worker_init.connect(init, weak=False)


def settings_of(app: Celery) -> Settings:
    """Return Byrd's own settings from the app's configuration (``byrd_lease_seconds``, ...)."""
    defaults = Settings()
    lease = float(app.conf.get("byrd_lease_seconds", defaults.lease_seconds))
    sweep = float(app.conf.get("byrd_sweep_seconds", defaults.sweep_seconds))
    most = int(app.conf.get("byrd_max_preemptions", defaults.max_preemptions))
    if lease < 1 or sweep <= 0 or most < 0:
        raise ConfigurationError(
            f"byrd_lease_seconds={lease} must be at least 1, byrd_sweep_seconds={sweep} more than 0, "
            f"byrd_max_preemptions={most} not negative"
        )
    return Settings(lease, sweep, most)


def slice_seconds_of(app: Celery) -> float:
    """Return the setting ``byrd_slice_seconds``."""
    seconds = float(app.conf.get("byrd_slice_seconds", SLICE_SECONDS))
    if not 0 <= seconds <= 60:
        raise ConfigurationError(f"byrd_slice_seconds={seconds} must be 0, for a message a step, or up to 60")
    return seconds


def _can_slice(worker: Any) -> bool:
    """Tell whether a wake-up may be worth more than its own step here.

    What Celery counts or limits a message by, it must count and limit each step by; and in a pool of threads or
    greenlets each has its own message, for neither would be seen to by anybody when it breaks off.
    """
    limits = (worker.time_limit, worker.soft_time_limit, worker.max_tasks_per_child)
    # Steps that go down with one another are failed at once when none may lose its worker.
    return _pool_name(worker) in ("prefork", "solo") and not any(limits) and settings_of(worker.app).max_preemptions > 0


def _shares(app: Celery) -> list[str]:
    """Return the tasks whose steps may run without a message of their own."""
    return sorted(
        name
        for name, task in app.tasks.items()
        if task.rate_limit is None
        and task.time_limit is None
        and task.soft_time_limit is None
        and limit_of(task) is None
    )


def _is_listened_to(worker: Any) -> bool:
    """Tell whether Celery's events are sent; a monitor may ask for them at any time.

    A worker that has not come as far as to know says yes: steps may begin before it is asked again.
    """
    dispatcher = getattr(getattr(worker, "consumer", None), "event_dispatcher", None)
    if dispatcher is None:
        return True
    return dispatcher.enabled and (
        not dispatcher.groups or "task" in dispatcher.groups  # a worker's own heartbeats are events, too
    )


def _children(worker: Any) -> list[int]:
    """Return the processes of a prefork pool; the other pools have none."""
    pool = getattr(worker.pool, "_pool", None)
    return [process.pid for process in list(getattr(pool, "_pool", None) or []) if getattr(process, "pid", None)]


def _pool_name(worker: Any) -> str:
    return str(getattr(worker.pool_cls, "__module__", "")).rpartition(".")[2] or "unknown"
