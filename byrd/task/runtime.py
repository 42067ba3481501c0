"""What an app's steps need at run time: the store, the publisher, and who this worker is."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from celery import Celery
from celery.app.routes import MapRoute
from kombu.utils.json import dumps
from sqlalchemy.engine import URL

from byrd import policies
from byrd.arguments import checked_priority, json_of
from byrd.canvas import MAPS, Plan, Step, compile_canvas, enumerator_of, item_of, task_name
from byrd.errors import ArgumentError, CanvasError, CompensationError, ConfigurationError, UnknownTaskError
from byrd.ids import new_id
from byrd.items import EACH, Each, each_of
from byrd.limits import key_of, limit_of
from byrd.model import Mark, StepKind
from byrd.policies import Retry
from byrd.store import Store, Wakeup, limits, steps, sweeps
from byrd.task.idle import Idle
from byrd.task.publisher import Publisher
from byrd.task.standby import Standby
from byrd.task.values import loads

T = TypeVar("T")

#: Children of a pool that is spawned rather than forked learn their worker's id from here.
_WORKER_ID = "BYRD_WORKER_ID"
_SLICE_SECONDS = "BYRD_SLICE_SECONDS"
_RUNTIME = "_byrd_runtime"

#: Seven times as much memory is needed to send a value to Postgres.
MAX_VALUE_BYTES = 128 * 2**20
#: A place for each pool process, by its id, that says which step it runs.
_SLOTS, _SLOT_BYTES = 4096, 16
#: For so long one wake-up keeps a pool process from other messages.
SLICE_SECONDS = 0.2
#: Options of a step that its message need not bear.
_SHARED_OPTIONS = frozenset({
    "ignore_result", "serializer", "immutable", "retry", "retry_policy", "task_type", "route_name",
    policies.RETRY, policies.TIMEOUTS,
})  # fmt: skip

#: Postgres takes no statement, and holds no text, of 1 GB; quotes count twice.
MOST_VALUE_BYTES = 256 * 2**20


#: A step's queue, its options, and its compensation, if it has one (JSON).
_Nature = tuple[str, dict[str, Any], str | None]


class Runtime:
    """One app's connection to Byrd's database and to the broker."""

    def __init__(self, app: Celery, database_url: URL) -> None:
        self.app = app
        #: For callers: gives up after a while.
        self.store = Store(database_url)
        #: For running steps: what was done must be recorded, so it waits for Postgres as long as it takes.
        self.patient_store = self.store.with_patience(math.inf)
        #: For transactions of the user's own, which may take long: they take no connection from those above.
        self.user_store = Store(database_url, patience=math.inf, for_users=True)
        self.publisher = Publisher(
            app,
            lambda queue: self.store.run(sweeps.consumers, queue),
            line_up=partial(limits.line_up_all, self.store),
            database=str(database_url.database),
        )
        #: What a worker's main process has to record: its event loop must not wait for Postgres or the broker, so
        #: its recorder does it, in this order.
        self.chores: deque[Callable[[], list[Wakeup]]] = deque()
        #: What it has to publish: the sweeper does it.
        self.outbox: deque[Wakeup] = deque()
        #: Shared with the pool processes: whether anybody listens to Celery's events, whether the worker stops, which
        #: step each of them runs, whether one of them copes alone, and whether one waits for an offer.
        self._flags: mmap.mmap | None = None
        self._running: mmap.mmap | None = None
        self.standby, self.idle = Standby(), Idle()
        #: Has the pool process that waits for an offer cease; given by the worker's main process.
        self.cease_to_wait: Callable[[], object] = tuple
        self._natures: dict[str, tuple[tuple[Any, ...], _Nature]] = {}
        #: The settings when they were read, and what was read of them.
        self._settings: tuple[Any, int, dict[str, Any], dict[str, Any]] | None = None
        self._worker_id: str | None = None
        self._main_pid: int | None = None
        setattr(app, _RUNTIME, self)

    @property
    def worker_id(self) -> str:
        """The id of the worker that this process belongs to."""
        found = self._worker_id or os.environ.get(_WORKER_ID)
        if found is None:
            raise ConfigurationError(
                "this process is not a Byrd worker: create byrd.Byrd(app) in the module that `celery -A` names"
            )
        return found

    def setting(self, name: str, read: Callable[[Any], T]) -> T:
        """Return ``read(app.conf)``, read anew when a setting has changed: Celery looks through four layers for each.

        ``name``: one for each ``read``.
        """
        conf, known = self.app.conf, self._settings
        if known is None or conf is not known[0] or (len(conf.maps), conf.changes) != known[1:3]:
            known = self._settings = (conf, len(conf.maps), dict(conf.changes), {})
        if name not in known[3]:
            known[3][name] = read(conf)
        found: T = known[3][name]
        return found

    @property
    def max_preemptions(self) -> int:
        """How often a step may lose its worker before it is failed."""
        return int(self.app.conf.get("byrd_max_preemptions", steps.MAX_PREEMPTIONS))

    @property
    def max_value_bytes(self) -> int:
        """How large the JSON of one result, cursor or memoised value may be, and that of all arguments of one plan."""
        found = self.setting("byrd_max_value_bytes", _most_value_bytes)
        if not 0 < found <= MOST_VALUE_BYTES:
            raise ConfigurationError(f"byrd_max_value_bytes={found} must be more than 0, at most {MOST_VALUE_BYTES}")
        return found

    def too_large(self, size: int) -> str | None:
        """Return what to say of JSON of this size that Postgres should not have to hold; None when it may."""
        most = self.max_value_bytes
        if size <= most:
            return None
        return (
            f"{size:,} bytes of JSON, more than byrd_max_value_bytes={most:,}: keep what is large in a file or an "
            "object store, and hand on its address"
        )

    @property
    def slice_seconds(self) -> float:
        """For how long a pool process of this worker may go on for one wake-up; 0: each step has its own message."""
        return float(os.environ.get(_SLICE_SECONDS, "0"))

    def slice_steps(self, seconds: float) -> None:
        """Let the pool processes of this worker work in slices of this length, or, with 0, not."""
        os.environ[_SLICE_SECONDS] = str(seconds)

    def become_worker(self, worker_id: str) -> None:
        """Take the identity of a worker, for this process and those that its pool starts."""
        self._worker_id = os.environ[_WORKER_ID] = worker_id
        self._main_pid = os.getpid()
        self._flags, self._running = mmap.mmap(-1, 2), mmap.mmap(-1, _SLOTS * _SLOT_BYTES)
        self.standby, self.idle = Standby(), Idle()

    @property
    def listened(self) -> bool:
        """True when somebody listens to Celery's events, or when this process cannot know."""
        return self._flags is None or self._flags[0] != 0

    @listened.setter
    def listened(self, listened: bool) -> None:
        if self._flags is not None:
            self._flags[0] = listened

    @property
    def stopping(self) -> bool:
        """True once this worker was told to stop: its slices take nothing more."""
        return self._flags is not None and self._flags[1] != 0

    def stop(self) -> None:
        """The worker was told to stop.  Postgres is told by its keeper, which takes a moment."""
        if self._flags is not None:
            self._flags[1] = 1

    def wait_for_offer(self, queues: Iterable[str], seconds: float) -> Any:
        """Wait, in a pool process that has begun to, for a step of these queues that has no message; None without one.

        It takes about so many seconds, less when a message needs the process.  Returns what anybody may have written.
        """
        try:
            return self.publisher.wait_for_offer(queues, self.worker_id, seconds)
        finally:
            self.idle.end()

    @property
    def is_forked(self) -> bool:
        """True in a pool process that was forked from a worker's main process."""
        return self._main_pid not in (None, os.getpid())

    def note_free(self, *, free: bool) -> None:
        """Say, in the main process, whether a pool process is free beside one that waits for an offer."""
        self.idle.note_free(free=free)
        if not free and self.idle.waits():
            self.cease_to_wait()

    def note_running(self, step_id: str | None) -> None:
        """Say which step this pool process runs from now on, for its main process."""
        if self._running is not None:
            at = os.getpid() % _SLOTS * _SLOT_BYTES
            self._running[at : at + _SLOT_BYTES] = _digest(step_id) if step_id else bytes(_SLOT_BYTES)

    def is_running(self, pid: int, step_id: str) -> bool:
        """Tell whether a pool process said that it runs this step now; True when it cannot say."""
        if self._running is None:
            return True
        at = pid % _SLOTS * _SLOT_BYTES
        return self._running[at : at + _SLOT_BYTES] == _digest(step_id)

    @property
    def orphaned(self) -> bool:
        """True in a pool process that was forked from a worker's main process which is gone."""
        return self._main_pid is not None and self._main_pid not in (os.getpid(), os.getppid())

    def later(self, transition: Callable[..., list[Wakeup]], *args: Any, **kwargs: Any) -> None:
        """Have the recorder of this worker run a transition of the store, soon."""
        self.chores.append(partial(self.store.run, transition, *args, **kwargs))

    def close(self) -> None:
        """Close the connections to Postgres."""
        for store in (self.store, self.user_store):
            store.close()

    # -- plans -----------------------------------------------------------------------------------

    def plan(
        self,
        canvas: Any,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        inner: bool = False,
        retry: Retry | None = None,
    ) -> Plan:
        """Compile a canvas, and freeze what only the app knows: queues, task options, policies, compensations.

        ``retry``: the retry policy of steps that have none of their own.
        """
        plan = compile_canvas(canvas, self.app, args=args, kwargs=kwargs, inner=inner)
        if too_large := self.too_large(
            sum(len(step.args) + len(step.kwargs) + len(step.fallback or "") for step in plan.steps)
        ):
            raise ArgumentError(f"the arguments of {len(plan.steps):,} steps are together {too_large}")
        return Plan(tuple(self._frozen(step, retry) for step in plan.steps), plan.output)

    def _frozen(self, step: Step, retry: Retry | None) -> Step:
        if step.kind in (StepKind.JOIN, StepKind.WAIT, StepKind.SAGA):
            return step
        task = self.task_named(step.task)
        if step.input is None and not step.on_failure:
            _check_arguments(task, step)
        queue, options, compensation = self._nature(task, step)
        if retry is not None and policies.RETRY not in options and policies.RETRY not in step.options:
            options = {**options}
            policies.freeze(options, retry)
        if compensation is None:
            _check_compensation(task)
        if step.task in MAPS:
            self._check_mapped(step)
        step.mark = _mark(task)
        if step.task == EACH:
            queue, options, step.mark = self._nature_of_each(step, queue, options)
        limit_name, limit_key = _place(step, task)
        step.solo, step.queue, step.options = _is_solo(step, task, options), queue, options
        step.compensation, step.limit_name, step.limit_key = compensation, limit_name, limit_key
        return step

    def _check_mapped(self, step: Step) -> None:
        """Refuse a map of a saga task: it is one step, of a task of Celery's, which nothing undoes."""
        name = task_name(loads(step.kwargs).get("task"))
        task = self.app.tasks.get(name)
        mark = _mark(task)
        if mark is None and not any(getattr(task, what, None) for what in ("compensation_task", "confirm_function")):
            _check_compensation(task)
            return
        instead = "a group of its calls" if mark is not None else "a group of its calls, or byrd.each"
        raise CompensationError(
            f"{name} is a SagaTask that map, starmap and chunks call as a plain function, in one step of {step.task}: "
            f"nothing would undo it, or know its marks; use {instead}, where each call is a step"
        )

    def item(self, spec: Each, item: Any, retry: Retry | None, *, template: tuple[Step, bool] | None = None) -> Step:
        """Return the step of one item of an each; ``template``: what :func:`byrd.canvas.item_of` says of its spec."""
        step, takes_item = template or item_of(spec, self.app)
        new = replace(step, id=new_id())
        if takes_item:
            new.args = dumps([item, *loads(step.args)])
        return replace(self._frozen(new, retry), mark=None)

    def task_named(self, name: str | None) -> Any:
        """Return a task of the app; raise :class:`UnknownTaskError` when there is none of that name."""
        task = self.app.tasks.get(name)
        if task is None:
            known = ", ".join(sorted(name for name in self.app.tasks if not name.startswith("celery."))[:8])
            raise UnknownTaskError(
                f"the task {name!r} is not registered in this app; import its module (known: {known})"
            )
        return task

    def _nature_of_each(
        self, step: Step, queue: str, options: dict[str, Any]
    ) -> tuple[str, dict[str, Any], str | None]:
        """Check what an each calls; it runs where its enumerator would, or else its items do, unless it says where.

        Where its items are retriable it is, too, whatever it fails of.
        """
        spec = each_of(loads(step.kwargs))
        item, takes_item = item_of(spec, self.app)
        task = self.task_named(item.task)
        if _mark(task) == Mark.PIVOT:
            raise CanvasError(f"{EACH}: {item.task} is a pivot, which cannot be an item: nothing is undone after it")
        given = [None] if takes_item else []
        _check_arguments(task, replace(item, args=dumps([*given, *loads(item.args)])))
        # As if it had an input: what its arguments are is not known yet.
        item = self._frozen(replace(item, input=0), None)
        mark = item.mark
        if spec.pages is not None:
            pages = self._frozen(replace(enumerator_of(spec, self.app), input=0), None)
            first = [None] if step.input is not None else []
            kwargs = {**loads(pages.kwargs), "cursor": None}
            args = [*first, *loads(step.args), *loads(pages.args)]
            _check_arguments(self.task_named(pages.task), replace(pages, args=dumps(args), kwargs=dumps(kwargs)))
            policy = pages.options.get(policies.RETRY)
            options = {**options, **({policies.RETRY: policy} if policy is not None else {})}
            item = pages
        if not {"queue", "exchange", "routing_key"} & step.options.keys():
            queue = item.queue or queue
        return queue, options, mark

    def _nature(self, task: Any, step: Step) -> _Nature:
        """Return what the task and its routes say of a step; looked up once where it depends on nothing else."""
        router = self.app.amqp.router
        if step.options or not all(isinstance(route, MapRoute) for route in router.routes):
            return self._look_up(task, step)
        state = (task, task._get_exec_options(), task.ignore_result, router, *_policies_of(task))
        known = self._natures.get(task.name)
        if known is None or known[0] != state:  # they are the same objects, most often, which is seen at once
            known = self._natures[task.name] = (state, self._look_up(task, step))
        return known[1]

    def _look_up(self, task: Any, step: Step) -> _Nature:
        name = step.task or ""
        queue, options = self.route(name, _with_policies({**_task_options(task), **step.options}), step)
        compensation = getattr(task, "compensation_task", None)
        return (
            queue,
            json.loads(option_json(options, name)),
            self._compensation(compensation) if compensation is not None else None,
        )

    def _compensation(self, task: Any) -> str:
        queue, options = self.route(task.name, _with_policies(_task_options(task)), None)
        return option_json({"task": task.name, "queue": queue, "options": option_json(options, task.name)}, task.name)

    def route(self, name: str, options: dict[str, Any], step: Step | None) -> tuple[str, dict[str, Any]]:
        """Return the queue that Celery's router gives a task, and its options without the routing ones.

        Raises :class:`ArgumentError` for what is no priority.
        """
        options = dict(options)
        route_name = options.pop("route_name", None) or name
        wanted = {k: options.pop(k) for k in ("queue", "exchange", "routing_key", "exchange_type") if k in options}
        wanted = {k: v for k, v in wanted.items() if v is not None}
        args = loads(step.args) if step is not None else []
        kwargs = loads(step.kwargs) if step is not None else {}
        routed = self.app.amqp.router.route(wanted, route_name, args, kwargs, self.app.tasks.get(name))
        queue = routed.pop("queue", None)
        for key in ("exchange", "routing_key", "exchange_type"):
            value = routed.pop(key, None)
            if queue is None and value:
                options[key] = getattr(value, "name", value)
        options.update({k: v for k, v in routed.items() if v is not None and k not in options})
        if "priority" in options:
            if options["priority"] is None:
                del options["priority"]
            else:
                options["priority"] = checked_priority(options["priority"], name)
        queue_name = getattr(queue, "name", queue) or self.app.conf.task_default_queue
        return str(queue_name), options


def _most_value_bytes(conf: Any) -> int:
    return int(conf.get("byrd_max_value_bytes", MAX_VALUE_BYTES))


def _digest(step_id: str) -> bytes:
    return hashlib.blake2b(step_id.encode(), digest_size=_SLOT_BYTES).digest()


def runtime_of(app: Celery) -> Runtime:
    """Return the runtime of an app that Byrd has adopted."""
    found: Runtime | None = getattr(app, _RUNTIME, None)
    if found is None:
        raise ConfigurationError(f"the app {app.main!r} has no engine: call byrd.Byrd(app) once, where the app is made")
    return found


def _is_solo(step: Step, task: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether the step has to run by a message of its own, for what Celery does with that message."""
    return (
        step.kind not in (StepKind.TASK, StepKind.CALLBACK)
        or step.on_failure
        or step.expires_in is not None
        or step.expires_at is not None
        or task.rate_limit is not None
        or limit_of(task) is not None
        or step.saga is not None
        or step.mark is not None
        or not options.keys() <= _SHARED_OPTIONS
        or _is_timed(options)
    )


def _is_timed(options: Mapping[str, Any]) -> bool:
    """Tell whether a running attempt may be ended, with all that its message runs."""
    timeouts = policies.timeouts_of(options)
    return timeouts is not None and timeouts.of_attempts


def _policies_of(task: Any) -> tuple[Any, Any]:
    return getattr(task, policies.RETRY, None), getattr(task, policies.TIMEOUTS, None)


def _with_policies(options: dict[str, Any]) -> dict[str, Any]:
    policies.freeze(options)
    return options


def _mark(task: Any) -> str | None:
    if getattr(task, "pivot", False) is True:
        return Mark.PIVOT.value
    return Mark.RETRIABLE.value if getattr(task, "retriable", False) is True else None


def _check_compensation(task: Any) -> None:
    """Refuse a saga task that neither has a compensation nor says that it needs none."""
    if hasattr(task, "compensation_task") and task.compensation is not None:
        raise CompensationError(
            f"{task.name} is a SagaTask without a compensation: name what undoes it with its .compensation, "
            "or declare it with compensation=None if there is nothing to undo"
        )


def _place(step: Step, task: Any) -> tuple[str | None, str | None]:
    """Return the limit of a step and its key of it, where its arguments are known: then it lines up without a message.

    Raises :class:`LimitKeyError`.
    """
    limit = limit_of(task)
    if limit is None or step.input is not None or step.on_failure:
        return None, None
    key = key_of(limit, task.run, loads(step.args), loads(step.kwargs))
    return (None, None) if key is None else (limit.name, key)


def _task_options(task: Any) -> dict[str, Any]:
    options = {k: v for k, v in task._get_exec_options().items() if v is not None}
    options.pop("serializer", None)  # always JSON
    if task.ignore_result:
        options["ignore_result"] = True
    named = zip((policies.RETRY, policies.TIMEOUTS), _policies_of(task), strict=True)
    options.update({name: policy for name, policy in named if policy is not None})
    return options


def _check_arguments(task: Any, step: Step) -> None:
    """Refuse arguments that the task cannot take, as ``apply_async`` does, before anything is written."""
    check = getattr(task, "__header__", None)
    if check is None or not task.typing or step.task in MAPS:
        return
    try:
        check(*loads(step.args), **loads(step.kwargs))
    except TypeError as exc:
        raise ArgumentError(f"{step.task}: {exc}") from None


def option_json(options: Mapping[str, Any], task: str) -> str:
    """Return a step's options as JSON that Postgres can read, for it does; raise :class:`ArgumentError` otherwise."""
    text = json_of(dict(options), task, "options")
    if "\\ud" in text:
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"{task}: its options contain half of a surrogate pair, which is no text; remove it"
            ) from None
    return text
