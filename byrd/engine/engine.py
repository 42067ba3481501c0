"""The engine: one per Celery app."""

from __future__ import annotations

import inspect
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ParamSpec, TypeVar, Unpack, overload

from celery import Celery
from celery.canvas import Signature
from kombu.utils.json import dumps
from sqlalchemy import Connection
from sqlalchemy.engine import URL

from byrd.engine import bulk, each, settings, subworkflow
from byrd.engine.bulk import Wanted
from byrd.engine.limits import Limits
from byrd.engine.run import Run
from byrd.engine.workflow import Workflow
from byrd.errors import (
    ArgumentError,
    ConfigurationError,
    RunNotFoundError,
    ShuttingDownError,
    SubmitError,
    UnknownWorkflowError,
)
from byrd.ids import new_id
from byrd.model import RunStatus
from byrd.policies import Retry
from byrd.sagas import add_task as add_saga
from byrd.store import WorkerRow, metrics, plans, reading, sweeps, waits
from byrd.store.bulk import BULK
from byrd.store.metrics import Metrics
from byrd.store.waits import Awaited
from byrd.task import Runtime, adopt_app
from byrd.task.durable import adopt_task
from byrd.waits import add_tasks as add_waits
from byrd.waits import checked_of, checked_pattern
from byrd.worker import prepare_worker

#: The task that a schedule runs: it submits a workflow by name.
SUBMIT_TASK = "byrd.submit"
_NUL = "\0"
P = ParamSpec("P")
R = TypeVar("R")


class Byrd:
    """Adopts a Celery app: from now on each of its tasks may be a step, and each of its canvases a run.

    Call it once, in the module where the app is made and configured (the one that ``celery -A`` names), before or
    after the tasks are defined.  The database is ``database_url``, else ``BYRD_DATABASE_URL``, else the setting
    ``byrd_database_url``, else the app's own Postgres result backend.  ``BYRD_BROKER_URL`` overrides the app's broker.

    Raises :class:`ConfigurationError`, or :class:`UnsafeSettingError` for settings that would lose work.
    """

    def __init__(self, app: Celery, database_url: str | URL | None = None) -> None:
        if getattr(app, "byrd", None) is not None:
            raise ConfigurationError(f"the app {app.main!r} has an engine already: app.byrd")
        self.app = app
        url = settings.apply(app, database_url)
        self.runtime = Runtime(app, url)
        #: The limits of the cluster: to be seen, and to be set otherwise than the code declares them.
        self.limits = Limits(self)
        self._workflows: dict[str, Workflow[..., Any]] = {}
        self._closed = False
        self._live = False
        adopt_app(app)
        prepare_worker(app)
        app.byrd = self
        self._add_submit_task()
        add_waits(app)
        bulk.add_task(app)
        self._workflows[BULK] = Workflow(self, BULK, partial(bulk.signature, app), None)
        subworkflow.add_task(self)
        each.add_task(self)
        add_saga(app)

    # -- submitting ------------------------------------------------------------------------------

    def submit(
        self,
        canvas: Any,
        *args: Any,
        key: str | None = None,
        connection: Any = None,
        timeout: float | None = None,
        retry: Retry | None = None,
        **kwargs: Any,
    ) -> Run:
        """Write a run of a canvas, or of a workflow by its name; once this has returned, the run will reach an end.

        ``args`` and ``kwargs`` go to the workflow's function, or to the canvas as ``apply_async`` would give them.
        ``key``: a second submit with the same key (of the same workflow) returns the first run.
        ``connection``: a SQLAlchemy Connection or Session on Byrd's database, whose transaction the run joins:
        nothing is published before its commit, nothing remains after its rollback.
        ``timeout``: seconds until the run is stopped and failed.
        ``retry``: when steps are tried again that have no policy of their own, by their task or their signature.

        Raises :class:`SubmitError` for what cannot be run and :class:`NotLiveError` when the service is not live;
        then nothing was written.
        """
        self._check_may_submit()
        new = self.new_run(canvas, args, kwargs, key=key, timeout=timeout, retry=retry)
        return Run(self, self._write([new], connection)[0])

    def submit_many(
        self,
        canvases: Iterable[Any],
        *,
        keys: Iterable[str | None] | None = None,
        connection: Any = None,
        timeout: float | None = None,
        retry: Retry | None = None,
    ) -> Sequence[Run]:
        """Write a run of each canvas, all in one transaction: much faster than one by one.

        ``keys`` are one for each canvas; otherwise as :meth:`submit`.  All are written, or none.
        """
        self._check_may_submit()
        wanted = list(canvases)
        named = [None] * len(wanted) if keys is None else list(keys)
        if len(named) != len(wanted):
            raise ArgumentError(f"{len(wanted)} canvases need as many keys, not {len(named)}")
        new = [
            self.new_run(canvas, (), {}, key=key, timeout=timeout, retry=retry)
            for canvas, key in zip(wanted, named, strict=True)
        ]
        given = [(run.workflow, run.key) for run in new if run.key is not None]
        if len(given) != len(set(given)):
            raise ArgumentError("two of the canvases have the same key")
        return [Run(self, run_id) for run_id in self._write(new, connection)] if new else []

    def _check_may_submit(self) -> None:
        self.check_live()
        self.runtime.setting("refuse_unsafe", settings.refuse_unsafe)

    def new_run(
        self,
        canvas: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        *,
        key: str | None = None,
        timeout: float | None = None,
        parent_step: str | None = None,
        retry: Retry | None = None,
    ) -> plans.NewRun:
        """Return a run as it is to be written; ``parent_step``: the step that it is the work of."""
        if isinstance(canvas, Workflow):
            canvas = canvas.name
        name: str | None = None
        call: str | None = None
        if isinstance(canvas, str):
            workflow = self.workflow_named(canvas)
            name, title = canvas, canvas
            call = _call_json(canvas, args, kwargs)
            canvas = _canvas_of(workflow, args, kwargs)
            timeout = timeout if timeout is not None else workflow.timeout
            retry = retry if retry is not None else workflow.retry
            args, kwargs = (), {}
        else:
            title = _title(canvas)
        if key is not None and not _is_key(key):
            raise ArgumentError(f"key={key!r} must be a text that is not empty and has no NUL character")
        if timeout is not None and not timeout > 0:
            raise ArgumentError(f"timeout={timeout!r} must be a number of seconds above 0")
        policy = None if retry is None else Retry.of(retry)
        plan = self.runtime.plan(canvas, args=args, kwargs=kwargs, retry=policy)
        return plans.NewRun(new_id(), plan, name, title, key, call, timeout, parent_step)

    def _write(self, new: Sequence[plans.NewRun], connection: Any) -> list[str]:
        """Write runs in one transaction, or in the caller's."""
        for _ in range(3):
            try:
                if connection is not None:
                    conn: Connection = connection.connection() if hasattr(connection, "get_bind") else connection
                    return settings.named_errors(plans.write, conn, new, told=False)[0]
                alone = all(run.plain and run.key is None for run in new)
                store = self.runtime.store
                run = store.run_alone if alone else store.run
                written, wakeups = settings.named_errors(run, plans.write, new)
            except plans.RunVanishedError:
                continue
            self.runtime.publisher.publish(wakeups)
            return written
        raise SubmitError("the run that has this key came and went three times meanwhile; submit again")

    # -- workflows -------------------------------------------------------------------------------

    @overload
    def workflow(
        self, name: str, *, timeout: float | None = None, retry: Retry | None = None
    ) -> Callable[[Callable[P, R]], Workflow[P, R]]: ...

    @overload
    def workflow(self, name: Callable[P, R]) -> Workflow[P, R]: ...

    def workflow(self, name: Any = None, *, timeout: float | None = None, retry: Retry | None = None) -> Any:
        """Register a function that returns a canvas under a name, to be started, listed and scheduled by it.

        ``timeout``: seconds after which a run of it is stopped and failed.  ``retry``: as for :meth:`submit`.
        """
        if callable(name):
            return self.workflow(f"{name.__module__}.{name.__qualname__}")(name)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.:\-/]{1,200}", name):
            raise ConfigurationError(f"the workflow name {name!r} must be 1 to 200 letters, digits or any of . : - / _")

        policy = None if retry is None else Retry.of(retry)

        def register(build: Callable[..., Any]) -> Workflow[..., Any]:
            if name in self._workflows:
                raise ConfigurationError(
                    f"the workflow {name!r} is registered already, by {self._workflows[name].build}"
                )
            self._workflows[name] = Workflow(self, name, build, timeout, policy)
            return self._workflows[name]

        return register

    def workflow_named(self, name: str) -> Workflow[..., Any]:
        """Return the workflow of that name; raise :class:`UnknownWorkflowError` when there is none."""
        if name not in self._workflows:
            self.app.loader.import_default_modules()
        try:
            return self._workflows[name]
        except KeyError:
            known = ", ".join(self.workflows) or "none"
            raise UnknownWorkflowError(
                f"no workflow is called {name!r}; import the module that defines it (known: {known})"
            ) from None

    @property
    def workflows(self) -> list[str]:
        """The names of the registered workflows, Byrd's own (``byrd.bulk``) apart."""
        return sorted(self._workflows.keys() - {BULK})

    # -- runs ------------------------------------------------------------------------------------

    def get(self, run_id: str) -> Run:
        """Return the run of that id; raise :class:`RunNotFoundError` when there is none.

        The first letters of an id will do when they name one run only.
        """
        self.check_live()
        text = str(run_id)
        try:
            full = str(uuid.UUID(text))
        except ValueError:
            found = (
                self.runtime.store.run(reading.find, text.lower()) if re.fullmatch(r"[0-9a-fA-F-]{4,36}", text) else []
            )
            if len(found) != 1:
                why = "no run has the id" if not found else f"{len(found)} runs or more have ids that begin with"
                raise RunNotFoundError(f"{why} {text}") from None
            full = found[0]
        self.runtime.store.run(reading.get, full)
        return Run(self, full)

    def list(
        self, *, workflow: str | None = None, status: str | Iterable[str] | None = None, limit: int = 50
    ) -> list[Run]:
        """Return the newest runs, newest first."""
        self.check_live()
        statuses = [status] if isinstance(status, str) else list(status) if status is not None else None
        for wanted in statuses or []:
            if wanted not in set(RunStatus):
                raise ArgumentError(f"{wanted!r} is no status of a run; the statuses are {', '.join(RunStatus)}")
        rows = self.runtime.store.run(reading.list_runs, workflow=workflow, statuses=statuses, limit=limit)
        return [Run(self, row.id, row) for row in rows]

    def bulk(self, action: str, *, key: str | None = None, **wanted: Unpack[Wanted]) -> Run:
        """Submit a job that does ``action`` ("cancel", "retry", "pause" or "resume") to all runs that match.

        ``workflow``, ``status``: as for :meth:`list`; without a status, the runs that the action is for: those that can
        be cancelled, paused or resumed, and those that have failed.  ``older_than``, ``newer_than``: submitted before,
        or within, so many seconds.  ``error``: a text in the run's error, its type for one.  Without any of these,
        ``everything`` has to be said.  ``compensate``, ``terminate``, ``grace``, ``by``: as for :meth:`Run.cancel`.

        Returns the job, a run of the workflow ``byrd.bulk``; its value is
        ``{"action": "cancel", "matched": 9, "done": 8, "skipped": 1}``.  Runs that have changed meanwhile, or refuse,
        are skipped.  Bulk jobs are never acted on.
        Raises :class:`ArgumentError` for what cannot be done.
        """
        return self.submit(BULK, key=key, everything=True, **asdict(bulk.order(action, **wanted)))

    def bulk_matches(self, action: str, **wanted: Unpack[Wanted]) -> int:
        """Return how many runs :meth:`bulk` would act on now; the arguments are the same."""
        self.check_live()
        return bulk.matches(self, bulk.order(action, **wanted))

    def waiting(
        self,
        *,
        signal: str | None = None,
        workflow: str | None = None,
        of: str | None = None,
        limit: int = 50,
    ) -> Sequence[Awaited]:
        """Return the steps that wait for a signal, those that have waited longest first: what awaits whom.

        ``signal``: a name, or the beginning of names with a ``*`` after it: ``"approval:*"``.  ``of``: who is to
        answer, as it was given to ``wait_for``.  Raises :class:`CanvasError` for what can be neither.
        """
        self.check_live()
        name = checked_pattern(signal) if signal is not None else None
        whom = checked_of(of) if of is not None else None
        return self.runtime.store.run(waits.list_awaited, signal=name, workflow=workflow, of=whom, limit=limit)

    def workers(self) -> Sequence[WorkerRow]:
        """Return the registered workers."""
        self.check_live()
        return self.runtime.store.run(sweeps.list_workers)

    def metrics(self) -> Metrics:
        """Return how many runs, steps and workers there are now, for a monitoring system of your own.

        What has ended is not counted, and not looked at: the cost is that of the work at hand.  Raises
        :class:`StoreUnavailableError` when Postgres does not answer, or takes more than five seconds.
        """
        self.check_live()
        return self.runtime.store.run(metrics.read)

    # -- the service -----------------------------------------------------------------------------

    def check_live(self) -> None:
        """Raise :class:`NotLiveError` unless this engine may take work."""
        if self._closed:
            raise ShuttingDownError("this engine was closed; make a new one to submit to it")
        if not self._live:
            self.runtime.store.check_live()
            self._live = True

    def close(self) -> None:
        """Take no more work, and close the connections."""
        self._closed = True
        self.runtime.close()

    def _add_submit_task(self) -> None:
        engine = self

        @self.app.task(name=SUBMIT_TASK, shared=False, ignore_result=False)
        def submit(workflow: str, *args: Any, key: str | None = None, **kwargs: Any) -> str:
            """Submit a workflow by its name; return the run's id."""
            return engine.submit(workflow, *args, key=key, **kwargs).id

        if self.app.finalized:
            adopt_task(self.app.tasks[SUBMIT_TASK])


def _canvas_of(workflow: Workflow[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        inspect.signature(workflow.build).bind(*args, **kwargs)
    except TypeError as exc:
        raise ArgumentError(f"workflow {workflow.name!r} cannot be called like this: {exc}") from None
    return workflow.build(*args, **kwargs)


def _is_key(key: object) -> bool:
    if not isinstance(key, str) or not key or _NUL in key:
        return False
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _title(canvas: Any) -> str:
    """Return a short text that tells a canvas from others in a list."""
    try:
        text = repr(canvas) if isinstance(canvas, Signature) else str(dict(canvas).get("task", ""))
    except Exception:  # noqa: BLE001 - a repr of the user's own objects may raise anything
        text = type(canvas).__name__
    text = " ".join(text.replace(_NUL, " ").split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _call_json(name: str, args: Any, kwargs: Any) -> str:
    try:
        text: str = dumps({"args": list(args), "kwargs": dict(kwargs)})
    except (TypeError, ValueError) as exc:
        raise ArgumentError(f"the arguments of workflow {name!r} cannot be held by JSON: {exc}") from None
    return text
