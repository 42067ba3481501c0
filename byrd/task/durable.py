"""Makes the tasks of an app durable: each message that names a step is claimed, run by Celery's own tracer, recorded.

Any task is adopted as it is, by giving it a class with :class:`DurableTask` in front of its own.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

from billiard import common as billiard_common
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, states
from celery.app.registry import TaskRegistry
from celery.app.task import Context
from celery.app.trace import TraceInfo, build_tracer, trace_ok_t
from celery.canvas import _chain
from celery.exceptions import Ignore, ImproperlyConfigured, Reject
from celery.exceptions import Retry as CeleryRetry
from celery.result import AsyncResult

from byrd.errors import ArgumentError, ControlFlow, StepCancelled, StepHandedBack, TaskOverrideError
from byrd.limits import limit_of
from byrd.model import PROTOCOL_VERSION, StepKind, StepStatus
from byrd.policies import check_declaration
from byrd.store import steps, sweeps, undo
from byrd.store.work import Own
from byrd.task import control, limited, results, retries, slices
from byrd.task.attempt import (
    Attempt,
    Compensation,
    RetryRequest,
    attempt_of,
    claim_step,
    execution_request,
    readable_header,
    to_json,
)
from byrd.task.publisher import SHARED
from byrd.task.reports import Report, report_of, with_reports
from byrd.task.runtime import option_json, runtime_of
from byrd.task.values import loads

log = logging.getLogger(__name__)
Tracer = Callable[[str, Any, Any, Mapping[str, Any]], Any]

#: What a task's own class may not override, for Byrd's version would be lost, or the user's never called.
_OURS = ("retry", "replace", "add_to_chord", "signature_from_request", "Request")
#: A step whose message was rejected with requeue comes back after this time, so that it does not spin.
_REQUEUE_SECONDS = 1.0
#: Set inside ``self.retry``: the attempt, whether it gets new arguments, the options asked for.
_retrying: ContextVar[tuple[Attempt, bool, Mapping[str, Any]] | None] = ContextVar("byrd_retrying", default=None)


class DurableTask(Task):
    """A Celery task that may be a step of a run.

    Every task of an app with an engine is one already; name it as ``base`` for clarity, or to subclass it.
    Called in the ordinary way (``delay``, ``apply_async``), it is an ordinary Celery task.
    """

    abstract = True
    Request = "byrd.worker.request:DurableRequest"

    @property
    def __trace__(self) -> Tracer | None:
        """The function that Celery's pools call to run the task."""
        return self.__dict__.get("_durable_tracer")

    @__trace__.setter
    def __trace__(self, tracer: Tracer | None) -> None:
        # Celery sets a new tracer when a worker starts, and again in each pool process.
        self.__dict__["_celery_tracer"] = tracer
        self.__dict__["_durable_tracer"] = None if tracer is None else partial(_trace, self, tracer)

    def retry(self, args: Any = None, kwargs: Any = None, *a: Any, **options: Any) -> Any:
        """Retry the task, as Celery's own; in a step it waits in Postgres, not as a message."""
        attempt = attempt_of(self.request)
        if attempt is None:
            return super().retry(args, kwargs, *a, **options)
        token = _retrying.set((attempt, args is not None or kwargs is not None, options))
        try:
            return super().retry(args, kwargs, *a, **options)
        except Exception as exc:
            attempt.gave_up = not isinstance(exc, CeleryRetry)
            raise
        finally:
            _retrying.reset(token)

    def heartbeat(self) -> None:
        """Say that the task is alive: one that has a ``heartbeat`` time-out, and saves no checkpoints, calls it often.

        Raises what stops the step here, as a checkpoint does, when its run is cancelled or paused, or its worker shuts
        down.  It costs a statement once in a quarter of that time, and at most once a second.  Outside a run it does
        nothing.
        """
        attempt = attempt_of(self.request)
        if attempt is not None:
            attempt.beat()

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Any:
        """Return the signature of this very call, as Celery's own."""
        sig = super().signature_from_request(*args, **kwargs)
        retrying = _retrying.get()
        if retrying is not None:
            # Celery's retry() would send this signature: it is where the retry is certain, so remember it instead.
            sig.apply_async = partial(_remember_retry, *retrying, sig)
        return sig

    def replace(self, sig: Any) -> Any:
        """Let a canvas take the task's place: its value becomes the step's, and what follows waits for it."""
        attempt = attempt_of(self.request)
        if attempt is None:
            return super().replace(sig)
        if "chord" in sig.options:
            raise ImproperlyConfigured("A signature replacing a task must not be part of a chord")
        if isinstance(sig, _chain) and not getattr(sig, "tasks", True):
            raise ImproperlyConfigured("Cannot replace with an empty chain")
        attempt.replace(sig)
        raise Ignore("Replaced by new task")

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:  # noqa: FBT001, FBT002 - Celery's own signature
        """Add a canvas to the chord that the task is a member of; its value comes last in what the body gets."""
        attempt = attempt_of(self.request)
        if attempt is None:
            return super().add_to_chord(sig, lazy=lazy)
        if attempt.claim.join_no is None:
            raise ValueError("Current task is not member of any chord")
        if lazy:
            raise ImproperlyConfigured(
                f"step {attempt.step_id}: add_to_chord(lazy=True) has no meaning in a run, where a step of the plan "
                "starts by itself; call it without lazy"
            )
        return AsyncResult(attempt.extend_chord(sig), app=self.app)


# -- running a step --------------------------------------------------------------------------------


def _trace(
    task: Task, tracer: Tracer, uuid: str, args: Any, kwargs: Any, request: Mapping[str, Any] | None = None
) -> Any:
    """Run one message: a step's through its claim, any other as Celery does."""
    named = (request or {}).get("byrd")
    if named is None:
        return tracer(uuid, args, kwargs, request or {})
    outcome = _without_frames(_trace_step(task, tracer, named, request or {}))
    if runtime_of(task.app).orphaned:
        _end_orphan()
    return outcome


def _trace_step(task: Task, tracer: Tracer, named: Any, request: Mapping[str, Any]) -> Any:
    header = readable_header(named)
    if header is None:
        return _refused(f"a message of {task.name} whose header names no step: {named!r:.200}")
    if header.get("v") != PROTOCOL_VERSION:
        runtime_of(task.app).patient_store.run(sweeps.pass_on, header["step"], header["attempt"])
        return _refused(f"a message of protocol version {header.get('v')!r:.20}, this worker knows {PROTOCOL_VERSION}")
    runtime = runtime_of(task.app)
    if header.get(SHARED) is True and runtime.slice_seconds > 0:
        reports: list[Report] | None = [] if runtime.listened else None
        work = slices.Slice(runtime, partial(_run_shared, request, reports, header["step"]))
        own_is_ready, outcome = work.work(Own(header["step"], header["attempt"], task.name))
        if not own_is_ready:
            if outcome is None and work.steps:
                outcome = _nothing("its step was taken by another process that was awake")
            elif outcome is None:
                outcome = _refused(_not_ready(header), logging.INFO)
            return with_reports(outcome, reports)
    limit = limit_of(task)
    if limit is not None:
        found = limited.claim(runtime, header, task, limit, _arguments)
        return _refused(found, logging.INFO) if isinstance(found, str) else _run(task, tracer, found, request)
    attempt = claim_step(runtime, header, task=task.name, pid=os.getpid())
    if attempt is None:
        return _refused(_not_ready(header), logging.INFO)
    return _run(task, tracer, attempt, request)


def _not_ready(header: Mapping[str, Any]) -> str:
    return f"step {header['step']:.100} is not ready for attempt {header['attempt']}"


def _run_shared(request: Mapping[str, Any], reports: list[Report] | None, own_id: str, attempt: Attempt) -> Any:
    """Run a step of a slice, of whatever task, that began with the message of ``request`` for step ``own_id``."""
    runtime = attempt.runtime
    task = runtime.app.tasks[attempt.claim.task]
    began = time.time()
    outcome = _without_frames(_run(task, _tracer_of(task), attempt, request))
    if reports is not None and attempt.step_id != own_id and task.send_events:
        reports.append(report_of(attempt, outcome, began))
    if not attempt.closed:  # the main process knows of the step of its own message only
        step = (attempt.step_id, attempt.number)
        reason = "its outcome could not be recorded"
        most = runtime.max_preemptions
        wakeups = runtime.patient_store.run(
            steps.preempt, runtime.worker_id, step=step, reason=reason, max_preemptions=most
        )
        runtime.publisher.publish(wakeups)
    return outcome


def _tracer_of(task: Task) -> Tracer:
    found: Tracer | None = task.__dict__.get("_celery_tracer")
    if found is None:  # it was registered after the pool process was started
        app = task.app
        task.__trace__ = build_tracer(task.name, task, app.loader, app=app)
        found = task.__dict__["_celery_tracer"]
    return found


def _run(task: Task, tracer: Tracer, attempt: Attempt, request: Mapping[str, Any]) -> Any:
    """Run a claimed step by Celery's tracer, and see that its outcome is recorded."""
    pid, uuid = os.getpid(), attempt.step_id
    attempt.runtime.note_running(uuid)
    try:
        try:
            call_args, call_kwargs = _arguments(task, attempt)
        except (ValueError, RecursionError) as exc:  # JSON that could be written, but is too deep to be read
            attempt.fail(attempt.runtime.app.backend.encoded_error(exc))
            return _nothing(f"its arguments cannot be read: {exc!r}")
        traced = retries.tracer_of(task, attempt) or tracer
        outcome = traced(uuid, call_args, call_kwargs, execution_request(attempt, request, call_args, call_kwargs))
        return _settle(attempt, outcome)
    except ControlFlow as flow:
        return _stop(attempt, flow)
    except Reject as exc:
        # Not one from the task itself, which the tracer catches: from a hook, after the outcome.
        return _settle(attempt, trace_ok_t(None, TraceInfo(states.REJECTED, exc), 0.0, None))
    except BaseException as exc:
        if isinstance(exc, SystemExit) and _terminated():
            raise  # the pool process was told to end, and its worker gives the step back
        if _is_green_timeout(exc) and (task.time_limit or loads(attempt.claim.options).get("time_limit")):
            raise  # Celery's hard time limit in a pool of greenlets: the main process, which is this one, records it
        if _is_greenlet_exit(exc):
            _give_back(attempt, "its greenlet was killed")  # unless whoever did it has seen to the step
            raise
        return _broken(attempt, exc)
    finally:
        if os.getpid() != pid:
            _end_fork(attempt)
        attempt.runtime.note_running(None)


def _arguments(task: Task, attempt: Attempt) -> tuple[list[Any], dict[str, Any]]:
    """Return what the task is called with: the plan's bindings, resolved."""
    claim = attempt.claim
    args, kwargs = loads(claim.args), loads(claim.kwargs)
    if claim.kind == StepKind.COMPENSATION and claim.compensates is not None:
        undone = attempt.runtime.patient_store.run(undo.compensated_call, claim.id)
        attempt.undoes = Compensation(
            key=claim.id,
            run_id=claim.run_id,
            step=undone.no,
            step_id=undone.id,
            task=undone.task,
            known=undone.status == StepStatus.SUCCEEDED,
            reason=undone.reason or _line_of(undone.error),
            failed_step=undone.failed_step,
            failed_task=undone.failed_task,
            by=undone.by,
        )
        first = [loads(undone.input)] if undone.input is not None else []
        return [loads(undone.result or "null"), *first, *loads(undone.args)], loads(undone.kwargs)
    if claim.input_no is None:
        return args, kwargs
    if claim.on_failure:
        return [*_failure(task, attempt, args, kwargs), *args], kwargs
    return [loads(claim.input or "null"), *args], kwargs


def _line_of(error: str | None) -> str:
    """Return a recorded error (JSON) as one line."""
    if error is None:
        return "somebody asked for it"
    found = loads(error)
    said = found.get("exc_message")
    parts = said if isinstance(said, list | tuple) else [said]
    return f"{found.get('exc_type')}: {', '.join(str(part) for part in parts)}"


def _failure(task: Task, attempt: Attempt, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return how the errback gets the failure: (request, exc, traceback), or the id of the failed step alone.

    Celery tells the two styles apart by the errback's signature (``Backend._call_task_errbacks``).
    """
    claim = attempt.claim
    if not _takes_failure(task, args, kwargs):
        return [claim.parent_id]
    exc, traceback = task.app.backend.decoded_error(claim.after_error)
    request = Context(
        {"id": claim.parent_id, "task": claim.parent_task, "root_id": claim.run_id, "errbacks": [], "delivery_info": {}}
    )
    return [request, exc, traceback]


def _takes_failure(task: Task, args: list[Any], kwargs: dict[str, Any]) -> bool:
    header = getattr(task, "__header__", None)
    if header is None or isinstance(header, partial):
        return False
    try:
        parameters = inspect.signature(partial(header, *args, **kwargs)).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _settle(attempt: Attempt, outcome: Any) -> Any:
    """Record what Celery's tracer leaves unrecorded: Ignore, Reject, and errors of its own."""
    if attempt.closed:
        return outcome
    info = outcome.info
    state = getattr(info, "state", None)
    if attempt.retry_with is not None and state in (states.IGNORED, states.REJECTED):
        attempt.retry(None)  # self.retry(throw=False), and then the task gave up its message: the retry stands
        return outcome
    if state == states.REJECTED:
        if getattr(info.retval, "requeue", False):
            attempt.hand_back(delay=_REQUEUE_SECONDS)
        else:
            attempt.fail(attempt.runtime.app.backend.encoded_error(info.retval))
        return _nothing("rejected")
    if state == states.IGNORED:
        attempt.drop(str(info.retval))
        return outcome
    exc = getattr(info, "retval", None)
    if not isinstance(exc, BaseException):
        exc = RuntimeError(f"the task ended in state {state} without an outcome")
    attempt.fail(attempt.runtime.app.backend.encoded_error(exc))
    return outcome


def _broken(attempt: Attempt, exc: BaseException) -> Any:
    """Return what tells the main process that the attempt came to no good end, for it to see to the step."""
    log.critical("step %s, attempt %d, is broken off: %r", attempt.step_id, attempt.number, exc, exc_info=exc)
    if not attempt.closed and not isinstance(exc, Exception):
        # SystemExit and the like, from the task itself: it ends the task, not the worker.
        attempt.fail(attempt.runtime.app.backend.encoded_error(exc))
    try:
        raise RuntimeError(f"the attempt was broken off by {exc!r}") from exc
    except RuntimeError as broken:
        return trace_ok_t(ExceptionInfo(), TraceInfo(states.FAILURE, broken), 0.0, None)


def _without_frames(outcome: Any) -> Any:
    """Cut the outcome's exceptions off from the frames that they went through, which hold the outcome in their turn.

    Such a circle, 175 KB for a retry, lives until Python's collector is due for its last generation: after hundreds of
    failures.  What is told of them, by the pool to the main process, is text by now.
    """
    info = getattr(outcome, "info", None)
    einfo = getattr(outcome, "retval", None)
    todo = [getattr(info, "retval", None), getattr(getattr(einfo, "exception", None), "exc", None)]
    while todo:
        exc = todo.pop()
        if isinstance(exc, BaseException) and exc.__traceback__ is not None:
            exc.__traceback__ = None
            todo += [exc.__cause__, exc.__context__, getattr(exc, "exc", None)]
    return outcome


def _give_back(attempt: Attempt, reason: str) -> None:
    """Have the main process, which is this one in a pool of greenlets, make the step ready again."""
    runtime, step = attempt.runtime, (attempt.step_id, attempt.number)
    runtime.later(steps.preempt, runtime.worker_id, step=step, reason=reason, max_preemptions=runtime.max_preemptions)


def _end_fork(attempt: Attempt) -> NoReturn:
    """End a process that the task has forked, and that came back from it: the pool's own goes on, and records."""
    log.critical(
        "step %s, attempt %d: process %d, which the task has forked, came back from it, and is ended; "
        "let it end in the task, by os._exit()",
        attempt.step_id,
        attempt.number,
        os.getpid(),
    )
    os._exit(70)  # not sys.exit(): nothing of the pool's own, which it has inherited, may run in it


def _end_orphan() -> NoReturn:
    """End a pool process whose main process is gone: nobody would give it another task.

    On Linux the kernel does so at once, unless a task has asked it not to.  Elsewhere, and then, the processes of a
    pool would wait for each other for ever: each holds an end of the pipes from which the others read their tasks.
    """
    log.warning("the worker's main process is gone, and with it ends its pool process %d", os.getpid())
    logging.shutdown()
    os._exit(70)


def _is_greenlet_exit(exc: BaseException) -> bool:
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(exc, greenlet.GreenletExit)


def _is_green_timeout(exc: BaseException) -> bool:
    gevent = sys.modules.get("gevent")
    return gevent is not None and isinstance(exc, gevent.Timeout)


def _terminated() -> bool:
    """Tell whether this pool process was sent a signal that ends it: billiard raises SystemExit then, in the task."""
    told: list[bool] = getattr(billiard_common, "_should_have_exited", [False])
    return bool(told and told[0])


def _stop(attempt: Attempt, flow: ControlFlow) -> Any:
    """End an attempt that a checkpoint has stopped, or that has lost its step."""
    if not attempt.closed:
        try:
            if isinstance(flow, StepCancelled):
                attempt.abandon()
            elif isinstance(flow, StepHandedBack):
                attempt.hand_back()
        except ControlFlow as stale:
            flow = stale
    log.info("step %s, attempt %d, stopped: %s", attempt.step_id, attempt.number, flow)
    return _nothing(str(flow))


def _refused(reason: str, level: int = logging.WARNING) -> Any:
    """Say what was wrong with a message, which runs nothing; a duplicate is nothing to worry about."""
    log.log(level, "nothing to run: %s", reason)
    return _nothing(reason)


def _nothing(reason: str) -> Any:
    """Return what tells Celery that there is no outcome to speak of: no event, no result."""
    try:
        raise Ignore(reason)
    except Ignore as exc:
        return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(states.IGNORED, exc), 0.0, None)


def _remember_retry(
    attempt: Attempt,
    new_args: bool,  # noqa: FBT001 - bound by partial()
    asked: Mapping[str, Any],
    sig: Any,
    *_args: Any,
    **_options: Any,
) -> None:
    eta = sig.options.get("eta")
    countdown = sig.options.get("countdown")
    if isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if isinstance(eta, datetime) and eta.tzinfo is None:
        eta = eta.replace(tzinfo=UTC)
    changed = {
        k: v for k, v in asked.items() if k not in ("exc", "throw", "eta", "countdown", "max_retries") and v is not None
    }
    queue = options = None
    if changed:
        merged = {**loads(attempt.claim.options), **changed}
        queue, merged = attempt.runtime.route(attempt.claim.task, merged, None)
        queue = queue if {"queue", "exchange", "routing_key"} & changed.keys() else None
        options = option_json(merged, attempt.claim.task)
    new = (to_json(list(sig.args)), to_json(dict(sig.kwargs))) if new_args else (None, None)
    if new_args and (too_large := attempt.runtime.too_large(sum(len(text) for text in new if text))):
        raise ArgumentError(f"step {attempt.step_id}: its new arguments are {too_large}")
    attempt.retry_with = RetryRequest(
        countdown=0.0 if countdown is None else float(countdown),
        eta=eta if isinstance(eta, datetime) and countdown is None else None,
        args=new[0],
        kwargs=new[1],
        queue=queue,
        options=options,
    )
    vars(sig).pop("apply_async", None)  # this very call, which holds the signature: no circle for the collector


# -- adoption --------------------------------------------------------------------------------------


class DurableRegistry(TaskRegistry):
    """The app's registry of tasks; each one that enters is adopted."""

    def __setitem__(self, name: str, task: Any) -> None:
        adopt_task(task)
        super().__setitem__(name, task)


def adopt_task(task: Any) -> None:
    """Make a task durable in place; its class gets :class:`DurableTask` in front."""
    plain = type(task)
    _refuse_overrides(task, plain)
    limited.adopt_limit(task)
    check_declaration(task)
    if issubclass(plain, DurableTask):
        return
    namespace = {"__module__": plain.__module__, "__doc__": plain.__doc__, "abstract": True}
    durable = type(plain.__name__, (DurableTask, plain), namespace)
    durable.__qualname__ = plain.__qualname__
    tracer = task.__dict__.pop("__trace__", None)
    # What Celery bound to the plain class belongs to the durable one too.
    task.__class__ = durable
    if tracer is not None:
        task.__trace__ = tracer


def adopt_app(app: Celery) -> None:
    """Adopt the tasks that the app has, and those that it will have, its result backend, and its remote control."""
    results.install(app)
    control.install(app)
    app._tasks.__class__ = DurableRegistry
    for task in list(app._tasks.values()):
        adopt_task(task)


def _refuse_overrides(task: Any, plain: type) -> None:
    for base in plain.__mro__:
        if base is Task or base is DurableTask or base.__module__.startswith(("celery.", "byrd.")):
            continue
        clash = [name for name in _OURS if name in base.__dict__ and not _is_celerys(name, base.__dict__[name])]
        if clash:
            raise TaskOverrideError(
                f"{base.__module__}.{base.__qualname__}, the class of the task {task.name!r}, overrides "
                f"{', '.join(clash)}, which Byrd needs for durable steps; rename it, or use before_start, on_retry, "
                "on_failure or __call__ instead"
            )


def _is_celerys(name: str, value: Any) -> bool:
    return name == "Request" and value in (Task.Request, DurableTask.Request)
