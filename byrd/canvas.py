"""A Celery canvas compiled to a plan: steps with frozen edges and argument bindings.  Pure.

The plan is a forest.  Each step has at most one predecessor (``after``); a group has a *join*, a step
without a task whose value is the list of its members' values.  What follows a group comes after the join,
so a group of 1,000 followed by a group of 1,000 has 2,001 edges, not a million.

What each construct means was read in Celery 5.7's ``canvas.py`` and ``app/trace.py`` and is compared with
Celery itself, eager and on a worker, by ``tests/canvas``.  Where the two differ from one another the plan
follows the eager one for nested values, the worker for errors.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from celery import Celery
from celery.canvas import Signature, _chain, _chord, chunks, group, maybe_signature
from kombu.utils.json import dumps

from byrd.errors import ArgumentError, CanvasError
from byrd.model import StepKind

#: Options that Celery writes while it freezes or sends a canvas; the plan has its own words for them.
_FROZEN_OPTIONS = frozenset({
    "task_id", "chain", "chord", "root_id", "parent_id", "reply_to", "group_id", "group_index",
    "link", "link_error", "producer", "publisher", "connection", "add_to_parent", "router", "result_cls",
    "replaced_task_nesting", "use_link",
})  # fmt: skip
#: A clone of one of these is an ordinary signature: only the task's name tells.
_MAPS = frozenset({"celery.map", "celery.starmap"})
_DELAYS = frozenset({"countdown", "eta"})
_TIMES = _DELAYS | {"expires"}


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a plan.

    ``after``: the step that must be done first (succeeded, or failed when ``on_failure``).
    ``input``: the step whose value is put before ``args``.  ``into``/``position``: the join that gets the value.
    ``members``: how many values a join waits for.
    """

    no: int
    id: str
    kind: StepKind
    task: str | None = None
    args: str = "[]"
    kwargs: str = "{}"
    options: Mapping[str, Any] = field(default_factory=dict)
    after: int | None = None
    on_failure: bool = False
    input: int | None = None
    into: int | None = None
    position: int | None = None
    members: int = 0
    group_id: str | None = None
    countdown: float | None = None
    eta: datetime | None = None
    expires_in: float | None = None
    expires_at: datetime | None = None
    queue: str | None = None
    compensation: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one canvas, in an order in which each comes after its predecessor; ``output`` is its value."""

    steps: tuple[Step, ...]
    output: int


@dataclass(frozen=True, slots=True)
class _Input:
    """What a canvas gets: the value of ``after`` (when ``value``), then literal arguments."""

    after: int | None = None
    value: bool = False
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_failure: bool = False
    kind: StepKind = StepKind.TASK

    def with_args(self, sig: Signature) -> _Input:
        """Return what reaches the parts of ``sig``, a canvas that may be immutable or hold partial arguments."""
        if sig.immutable:
            return replace(self, value=False, args=tuple(sig.args), kwargs={})
        return replace(self, args=(*self.args, *sig.args))

    def then(self, after: int, *, value: bool = True) -> _Input:
        """Return the input of what follows step ``after``."""
        return _Input(after=after, value=value, kind=self.kind)


def compile_canvas(
    canvas: Any,
    app: Celery,
    *,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    inner: bool = False,
) -> Plan:
    """Compile ``canvas`` (a signature of any kind, or its dictionary form) to a plan.

    ``args`` and ``kwargs`` are given to it as ``apply_async`` would.  ``inner``: it becomes a part of another plan, in
    the place of a task or beside it.  Raises :class:`CanvasError` or :class:`ArgumentError`; changes nothing, neither
    the canvas nor the app.
    """
    builder = _Builder(app)
    given = _Input(args=tuple(args), kwargs=dict(kwargs or {}))
    try:
        output = builder.visit(canvas, given, {}, top=not inner, inner=inner)
    except RecursionError:
        raise CanvasError("the canvas is nested too deeply to compile; flatten it, or split it in workflows") from None
    return Plan(tuple(builder.steps), output)


class _Builder:
    def __init__(self, app: Celery) -> None:
        self.app = app
        self.steps: list[Step] = []
        self.ids: set[str] = set()

    # -- steps -----------------------------------------------------------------------------------

    def add(self, step: Step) -> int:
        if step.id in self.ids:
            raise CanvasError(f"the task id {step.id!r} is used twice in the canvas; give each signature its own")
        self.ids.add(step.id)
        self.steps.append(step)
        return step.no

    def next_no(self) -> int:
        return len(self.steps)

    def change(self, no: int, **changes: Any) -> None:
        self.steps[no] = replace(self.steps[no], **changes)

    def signature(self, canvas: Any) -> Signature:
        if isinstance(canvas, Signature):
            return canvas
        if isinstance(canvas, Mapping) and "task" in canvas:
            return maybe_signature(dict(canvas), app=self.app)
        if hasattr(canvas, "s") and hasattr(canvas, "name"):
            raise CanvasError(f"{canvas.name} is a task, not a canvas: submit {canvas.name}.s(...)")
        raise CanvasError(f"cannot compile {type(canvas).__name__}: submit a signature, chain, group or chord")

    # -- the kinds of canvas ---------------------------------------------------------------------

    def visit(
        self,
        sig: Any,
        given: _Input,
        override: Mapping[str, Any],
        *,
        links: tuple[Any, ...] = (),
        errbacks: tuple[Any, ...] = (),
        top: bool = False,
        inner: bool = False,
    ) -> int:
        """Add the steps of ``sig``; return the number of the step whose value is the canvas's."""
        sig = self.signature(sig)
        if isinstance(sig, _chain):
            # Cloning a chain loses that it was immutable, and Celery clones all but the outermost.
            return self.chain(sig, given.with_args(sig) if top else given, override, links, errbacks, inner=inner)
        if isinstance(sig, group):
            return self.group(sig, given, override, links, errbacks, top=top)
        if isinstance(sig, _chord):
            return self.chord(sig, given, override, links, errbacks)
        if sig.task == "celery.chunks":
            return self.split(sig, given, override, links, errbacks)
        return self.task(sig, given, override, links, errbacks)

    def task(
        self, sig: Signature, given: _Input, override: Mapping[str, Any], links: tuple[Any, ...], errbacks: tuple[Any, ...]
    ) -> int:
        options = _merged(sig, override)
        links = _unique(_callbacks(sig, override), links)
        errbacks = _unique(_listed(sig.options.get("link_error")), errbacks)
        kwargs = dict(sig.kwargs)
        if sig.task in _MAPS:
            kwargs["it"] = list(kwargs["it"])
            options.setdefault("route_name", _task_name(kwargs.get("task")))
        if sig.immutable:
            literal: tuple[Any, ...] = tuple(sig.args)
            source = None
        else:
            literal = (*given.args, *sig.args)
            kwargs.update(given.kwargs)
            source = given.after if given.value else None
        no = self.next_no()
        self.add(
            Step(
                no=no,
                id=str(sig.options.get("task_id") or uuid.uuid4()),
                kind=given.kind,
                task=sig.task,
                args=_json(list(literal), sig.task, "arguments"),
                kwargs=_json(kwargs, sig.task, "keyword arguments"),
                options={k: v for k, v in options.items() if k not in _FROZEN_OPTIONS and k not in _TIMES},
                after=given.after,
                on_failure=given.on_failure,
                input=source,
                group_id=options.get("group_id"),
                **_times(options, sig.task),
            )
        )
        self.links(no, links, errbacks, given)
        return no

    def links(self, no: int, links: Iterable[Any], errbacks: Iterable[Any], given: _Input) -> None:
        """Hang the callbacks and errbacks of step ``no`` on it."""
        for callback in links:
            kind = StepKind.ERRBACK if given.kind is StepKind.ERRBACK else StepKind.CALLBACK
            self.visit(callback, replace(given.then(no), kind=kind), {})
        for errback in errbacks:
            # Its input is the failure itself: which form it takes, the worker sees by the errback's signature.
            self.visit(errback, _Input(after=no, value=True, on_failure=True, kind=StepKind.ERRBACK), {})

    def chain(
        self,
        sig: _chain,
        given: _Input,
        override: Mapping[str, Any],
        links: tuple[Any, ...],
        errbacks: tuple[Any, ...],
        *,
        inner: bool,
    ) -> int:
        links = _unique(_callbacks(sig, override), links)
        errbacks = _unique(_listed(sig.options.get("link_error")), errbacks)
        override = {**_settings(sig.options), **_settings(override)}
        parts = self.chain_parts(sig)
        if not parts:
            raise CanvasError("an empty chain has no value; Celery cannot run it either")
        if inner and _is_empty_group(sig.tasks[-1]) and not _is_empty_group(parts[-1][0]):
            # An empty group is nothing in a chain; but Task.replace makes a chord of one that comes last.
            parts.append((self.signature(sig.tasks[-1]), (), ()))
        last = len(parts) - 1
        out = -1
        for index, (part, own_links, own_errbacks) in enumerate(parts):
            part_links = _unique(own_links, links) if index == last else own_links
            # The chain's options reach its first part only: Celery sends just that one itself.
            options = override if index == 0 else {}
            if isinstance(part, group) and part_links:
                # A chain sets its callbacks as an option of its last part; a group's options replace its members'.
                options, part_links = {**options, "link": part_links}, ()
            out = self.visit(part, given, options, links=part_links, errbacks=_unique(own_errbacks, errbacks))
            given = given.then(out)
        return out

    def chain_parts(self, sig: _chain) -> list[tuple[Signature, tuple[Any, ...], tuple[Any, ...]]]:
        """Return the chain's parts with the links and errbacks that spliced chains brought with them.

        Nested chains are spliced in, empty groups dropped (a chain of nothing else keeps one), groups of one
        unrolled, and a group followed by anything becomes a chord with what follows as its body, as
        ``_chain.prepare_steps`` does.
        """
        flat: list[tuple[Signature, tuple[Any, ...], tuple[Any, ...]]] = []
        empty: Signature | None = None
        for raw in sig.tasks:
            part = self.signature(raw)
            if isinstance(part, _chain):
                inner = self.chain_parts(part)
                part_links, part_errbacks = _listed(part.options.get("link")), _listed(part.options.get("link_error"))
                inner = [(s, ls, _unique(es, part_errbacks)) for s, ls, es in inner]
                if inner:
                    last_sig, last_links, last_errbacks = inner[-1]
                    inner[-1] = (last_sig, _unique(last_links, part_links), last_errbacks)
                flat.extend(inner)
                continue
            if isinstance(part, group):
                members = list(part.tasks)
                if not members:
                    empty = part
                    continue
                if len(members) == 1:
                    flat.extend(self.chain_parts(_chain_of(self.signature(members[0]), sig)))
                    continue
            flat.append((part, (), ()))
        if not flat and empty is not None:
            return [(empty, (), ())]
        return self.upgrade_groups(flat)

    def upgrade_groups(
        self, flat: list[tuple[Signature, tuple[Any, ...], tuple[Any, ...]]]
    ) -> list[tuple[Signature, tuple[Any, ...], tuple[Any, ...]]]:
        parts: list[tuple[Signature, tuple[Any, ...], tuple[Any, ...]]] = []
        for part, part_links, part_errbacks in reversed(flat):
            if isinstance(part, group) and parts:
                body, body_links, body_errbacks = parts.pop()
                # A failed member fails the body, whose errbacks are called: the group's own join them there.
                errbacks = _unique(part_errbacks, body_errbacks)
                parts.append((_upgraded(part, body, body_links, errbacks, self.app), (), ()))
            else:
                parts.append((part, part_links, part_errbacks))
        parts.reverse()
        return parts

    def group(
        self,
        sig: group,
        given: _Input,
        override: Mapping[str, Any],
        links: tuple[Any, ...],
        errbacks: tuple[Any, ...],
        *,
        top: bool = False,
    ) -> int:
        replaced = _callbacks(sig, override)
        override = {**_settings(sig.options), **_settings(override), **({"link": replaced} if replaced else {})}
        members = self.members(sig)
        if links:
            # group.link attaches to the first member, immutable: it cannot pass its siblings' values on.
            links = tuple(self.signature(link).clone().set(immutable=True) for link in links)
        group_id = str(sig.options.get("task_id") or uuid.uuid4())
        outs = []
        for index, member in enumerate(members):
            out = self.visit(member, given, override, links=links if index == 0 else (), errbacks=errbacks)
            outs.append(out)
        if top and len(outs) == 1 and self.steps[outs[0]].kind is StepKind.JOIN:
            return outs[0]  # GroupResult of one chain that ends in a group: Celery returns the inner one
        join = self.next_no()
        self.add(
            Step(
                no=join,
                id=group_id,
                kind=StepKind.JOIN,
                after=given.after,
                on_failure=given.on_failure,
                members=len(outs),
            )
        )
        for position, out in enumerate(outs):
            self.change(out, into=join, position=position, group_id=group_id)
        return join

    def split(
        self, sig: Signature, given: _Input, override: Mapping[str, Any], links: tuple[Any, ...], errbacks: tuple[Any, ...]
    ) -> int:
        """Add the group that ``chunks`` stand for.

        Celery does so for chunks that are submitted alone; within a canvas it gives the ids of the group's results, and
        nothing waits for them.  The plan waits, and has the values.
        """
        split = chunks(sig.kwargs["task"], list(sig.kwargs["it"]), sig.kwargs["n"], app=self.app).group()
        options = {**_settings(sig.options), **_settings(override)}
        join = self.group(split, replace(given, value=False, args=(), kwargs={}), options, (), ())
        links = _unique(_callbacks(sig, override), links)
        self.links(join, links, _unique(_listed(sig.options.get("link_error")), errbacks), given)
        return join

    def members(self, sig: group) -> list[Signature]:
        """Return the members of a group: groups directly inside it are flattened, empty chains dropped."""
        found: list[Signature] = []
        for raw in sig.tasks:
            member = self.signature(raw)
            if isinstance(member, group):
                own = _settings(member.options)
                inner = self.members(member)
                found.extend(m.clone().set(**own) for m in inner) if own else found.extend(inner)
            elif not (isinstance(member, _chain) and not list(member.tasks)):
                found.append(member)
        return found

    def chord(
        self, sig: _chord, given: _Input, override: Mapping[str, Any], links: tuple[Any, ...], errbacks: tuple[Any, ...]
    ) -> int:
        if sig.body is None:
            raise CanvasError("a chord without a body cannot be submitted; give it one, or submit its header group")
        options = {**_settings(sig.options), **_settings(override)}
        links = _unique(_callbacks(sig, override), links)
        errbacks = _unique(_listed(sig.options.get("link_error")), errbacks)
        header = sig.tasks if isinstance(sig.tasks, group) else group(list(sig.tasks), app=self.app)
        given = given.with_args(sig)
        given = replace(given, kwargs={**(sig.kwargs.get("kwargs") or {}), **given.kwargs})
        join = self.group(header, given, options, (), ())
        body_options = {k: v for k, v in options.items() if k not in _DELAYS}
        return self.visit(sig.body, given.then(join), body_options, links=links, errbacks=errbacks)


def _upgraded(header: group, body: Signature, links: tuple[Any, ...], errbacks: tuple[Any, ...], app: Celery) -> _chord:
    """Return the chord that Celery makes of a group followed by ``body`` in a chain."""
    upgraded = _chord(header, body=None, app=app)
    upgraded.kwargs["body"] = body
    if links:
        upgraded.options["link"] = list(links)
    if errbacks:
        upgraded.options["link_error"] = list(errbacks)
    return upgraded


def _is_empty_group(sig: Any) -> bool:
    return isinstance(sig, group) and not list(sig.tasks)


def _chain_of(member: Signature, sig: _chain) -> _chain:
    single = _chain(app=sig._app)
    single.kwargs["tasks"] = [member]
    return single


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return (value,)
    return tuple(value)


def _unique(*groups: Iterable[Any]) -> tuple[Any, ...]:
    """Concatenate, dropping repeats as ``append_to_list_option`` does."""
    found: list[Any] = []
    for items in groups:
        found.extend(item for item in items if item not in found)
    return tuple(found)


def _callbacks(sig: Signature, override: Mapping[str, Any]) -> tuple[Any, ...]:
    return _listed(override["link"] if "link" in override else sig.options.get("link"))


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in _FROZEN_OPTIONS}


def _merged(sig: Signature, override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge options as ``Signature._merge`` does: stamps and the group's id stay the signature's own."""
    keep = {"group_id", "stamped_headers", *sig.options.get("stamped_headers", ())}
    merged = dict(sig.options)
    merged.update({k: v for k, v in override.items() if v is not None and not (k in keep and k in sig.options)})
    return merged


def _task_name(task: Any) -> str | None:
    return task.get("task") if isinstance(task, Mapping) else getattr(task, "name", None)


def _times(options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return when the step may start and until when, in the plan's words."""
    times: dict[str, Any] = {}
    countdown, eta, expires = options.get("countdown"), options.get("eta"), options.get("expires")
    if countdown is not None:
        times["countdown"] = _seconds(countdown, "countdown", task)
    elif eta is not None:
        times["eta"] = _moment(eta, "eta", task)
    if expires is not None:
        if isinstance(expires, int | float) and not isinstance(expires, bool):
            times["expires_in"] = _seconds(expires, "expires", task)
        else:
            times["expires_at"] = _moment(expires, "expires", task)
    return times


def _seconds(value: Any, name: str, task: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{task}: {name}={value!r} is not a number of seconds") from None
    if not -1e9 < seconds < 1e9:
        raise ArgumentError(f"{task}: {name}={value!r} is out of range")
    return seconds


def _moment(value: Any, name: str, task: str) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ArgumentError(f"{task}: {name}={value!r} is not an ISO 8601 date and time") from None
    if not isinstance(value, datetime):
        raise ArgumentError(f"{task}: {name}={value!r} is neither a datetime nor a number of seconds")
    return value.astimezone() if value.tzinfo is None else value


def _json(value: Any, task: str, what: str) -> str:
    """Return ``value`` as JSON text in Celery's own dialect (kombu's), or raise :class:`ArgumentError`."""
    try:
        text: str = dumps(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ArgumentError(f"{task}: its {what} cannot be held by JSON: {exc}") from None
    if "\\u0000" in text and _has_nul(value):
        raise ArgumentError(f"{task}: its {what} contain a NUL character, which Postgres cannot hold; remove it")
    return text


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Mapping):
        return any(_has_nul(k) or _has_nul(v) for k, v in value.items())
    return isinstance(value, list | tuple | set) and any(_has_nul(item) for item in value)
