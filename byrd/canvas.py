"""A Celery canvas compiled to a plan: steps with frozen edges and argument bindings.  Pure.

The plan is a forest.  Each step has at most one predecessor (``after``); a group has a *join*, a step
without a task whose value is the list of its members' values.  What follows a group comes after the join,
so a group of 1,000 followed by a group of 1,000 has 3,001 edges, not a million.

What each construct means was read in Celery 5.7's ``canvas.py`` and ``app/trace.py`` and is compared with
Celery itself, eager and on a worker, by ``tests/canvas``.  Where the two differ from one another the plan is
with one of them; ``docs/canvas.md`` says with which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from celery import Celery
from celery.canvas import Signature, _chain, _chord, chunks, group, maybe_signature
from kombu.utils.json import loads

from byrd.arguments import json_of, time_of_wait, times_of
from byrd.errors import ArgumentError, CanvasError
from byrd.ids import new_id
from byrd.items import EACH, Each, each_of, is_each
from byrd.model import StepKind
from byrd.sagas import body_of, is_saga
from byrd.waits import NOT_GIVEN, is_wait, wait_of

#: Options that Celery writes while it freezes or sends a canvas; the plan has its own words for them.
_FROZEN_OPTIONS = frozenset({
    "task_id", "chain", "chord", "root_id", "parent_id", "reply_to", "group_id", "group_index",
    "link", "link_error", "producer", "publisher", "connection", "add_to_parent", "router", "result_cls",
    "replaced_task_nesting", "use_link",
})  # fmt: skip
#: Tasks of Celery's that call another one, ``kwargs["task"]``, for each item.  A clone of one of these is an ordinary
#: signature: only the task's name tells.
MAPS = frozenset({"celery.map", "celery.starmap"})
_CHUNKS = "celery.chunks"
_DELAYS = frozenset({"countdown", "eta"})
_TIMES = _DELAYS | {"expires"}
#: How deep canvases may be nested: well below Python's own limit, which would strike anywhere.
_MAX_DEPTH = 200


@dataclass(slots=True)
class Step:
    """One node of a plan, to be changed by whoever makes the plan only.

    ``after``: the step that must be done first (succeeded, or failed when ``on_failure``).
    ``input``: the step whose value is put before ``args``.  ``into``/``position``: the join that gets the value.
    ``members``: how many values a join waits for.  ``solo``: it runs by a message of its own only.  ``signal``: what a
    wait waits for, if not for its time alone, which is in ``countdown`` and ``eta``; ``signal_of``: who is to send it;
    ``fallback``: its value (JSON) when its time has come, unless it has an ``input``.  ``limit_name``/``limit_key``:
    the limit of its task, and which key of it, where the arguments are known.  ``saga``: the saga that it is a step of,
    the innermost; None is the run.  ``mark``: ``pivot`` or ``retriable``.
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
    solo: bool = True
    signal: str | None = None
    signal_of: str | None = None
    fallback: str | None = None
    limit_name: str | None = None
    limit_key: str | None = None
    saga: int | None = None
    mark: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one canvas, in an order in which each comes after its predecessor; ``output`` is its value."""

    steps: tuple[Step, ...]
    output: int


@dataclass(frozen=True, slots=True)
class _Given:
    """What the canvas around a part gives it.

    The value of ``after`` (when ``value``), then literal arguments; options that override the part's own; callbacks and
    errbacks besides the part's own.  ``outermost``: there is no canvas around it.  ``inner``: it comes into a plan that
    runs already.  ``saga``: the saga that it is a part of.
    """

    after: int | None = None
    value: bool = False
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_failure: bool = False
    kind: StepKind = StepKind.TASK
    options: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[Any, ...] = ()
    errbacks: tuple[Any, ...] = ()
    outermost: bool = False
    inner: bool = False
    saga: int | None = None

    def then(self, after: int, **changes: Any) -> _Given:
        """Return what is given to what follows step ``after``: its value."""
        return _Given(after=after, value=True, kind=self.kind, saga=self.saga, **changes)

    def partial(self, sig: Signature) -> _Given:
        """Return what reaches the parts of ``sig``, a canvas that may be immutable or hold partial arguments."""
        if sig.immutable:
            return replace(self, value=False, args=tuple(sig.args), kwargs={})
        return replace(self, args=(*self.args, *sig.args))

    def options_of(self, sig: Signature) -> dict[str, Any]:
        """Return the options of ``sig`` that its parts get too."""
        return {k: v for k, v in {**sig.options, **self.options}.items() if k not in _FROZEN_OPTIONS}

    def links_of(self, sig: Signature) -> tuple[Any, ...]:
        """Return the callbacks of ``sig``."""
        own = self.options["link"] if "link" in self.options else sig.options.get("link")
        return _unique(_listed(own), self.links)

    def errbacks_of(self, sig: Signature) -> tuple[Any, ...]:
        """Return the errbacks of ``sig``."""
        return _unique(_listed(sig.options.get("link_error")), self.errbacks)


class _Part(NamedTuple):
    """A part of a chain, and what it inherits from nested chains that were spliced in."""

    sig: Signature
    links: tuple[Any, ...] = ()
    errbacks: tuple[Any, ...] = ()


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
    try:
        given = _Given(args=tuple(args), kwargs=dict(kwargs or {}), outermost=not inner, inner=inner)
        output = builder.visit(canvas, given)
    except RecursionError:
        raise CanvasError(_TOO_DEEP) from None
    return Plan(tuple(builder.steps), output)


def item_of(spec: Each, app: Celery) -> tuple[Step, bool]:
    """Return the step that is made for each item, and whether the item is its first argument: not of ``task.si()``.

    Raises :class:`CanvasError` unless it is one task, with nothing hanging on it.
    """
    sig = _Builder(app).signature(spec.task)
    if is_each(sig):
        raise CanvasError(f"{EACH}: an item is no each of its own; let it be a workflow that has one")
    found = compile_canvas(sig, app)
    step = found.steps[0]
    if len(found.steps) > 1 or step.kind is not StepKind.TASK:
        raise CanvasError(
            f"{EACH}: an item is a call of one task, without a callback, chain, group, saga or wait of its own; let it "
            "be a workflow if it takes more"
        )
    if str(step.task).startswith("celery."):
        raise CanvasError(f"{EACH}: {step.task} cannot be called with an item; give it a task of your own")
    return step, not sig.immutable


def enumerator_of(spec: Each, app: Celery) -> Step:
    """Return the call of an each's enumerator, but for its cursor; raise :class:`CanvasError` unless it is one task."""
    found = compile_canvas(spec.pages, app)
    if len(found.steps) > 1 or found.steps[0].kind is not StepKind.TASK or found.steps[0].task == EACH:
        raise CanvasError(f"{EACH}: an enumerator is one task, that is called for each page with cursor=...")
    return found.steps[0]


_TOO_DEEP = f"the canvas is nested too deeply (more than {_MAX_DEPTH} levels); flatten it, or split it in workflows"


class _Builder:
    def __init__(self, app: Celery) -> None:
        self.app = app
        self.depth = 0
        self.steps: list[Step] = []
        self.ids: set[str] = set()

    # -- steps -----------------------------------------------------------------------------------

    def add(self, step: Step) -> int:
        if step.id in self.ids:
            raise CanvasError(f"the task id {step.id!r} is used twice in the canvas; give each signature its own")
        self.ids.add(step.id)
        self.steps.append(step)
        return step.no

    def signature(self, canvas: Any) -> Signature:
        if isinstance(canvas, Signature):
            return canvas
        if isinstance(canvas, Mapping) and "task" in canvas:
            return maybe_signature(deepcopy(dict(canvas)), app=self.app)
        if hasattr(canvas, "s") and hasattr(canvas, "name"):
            raise CanvasError(f"{canvas.name} is a task, not a canvas: submit {canvas.name}.s(...)")
        raise CanvasError(f"cannot compile {type(canvas).__name__}: submit a signature, chain, group or chord")

    def hang(self, no: int, given: _Given, links: Iterable[Any], errbacks: Iterable[Any]) -> None:
        """Hang callbacks and errbacks on step ``no``."""
        kind = StepKind.ERRBACK if given.kind is StepKind.ERRBACK else StepKind.CALLBACK
        for callback in links:
            self.visit(callback, replace(given.then(no), kind=kind))
        for errback in errbacks:
            # Its input is the failure itself: which form it takes, the worker sees by the errback's signature.
            # It is no step of the saga that failed: it is called, and nobody stops it.
            self.visit(errback, replace(given.then(no), on_failure=True, kind=StepKind.ERRBACK, saga=None))

    # -- the kinds of canvas ---------------------------------------------------------------------

    def visit(self, canvas: Any, given: _Given) -> int:
        """Add the steps of a canvas; return the number of the step whose value is the canvas's."""
        if self.depth > _MAX_DEPTH:
            raise CanvasError(_TOO_DEEP)
        self.depth += 1
        try:
            return self.part(self.signature(canvas), given)
        finally:
            self.depth -= 1

    def part(self, sig: Signature, given: _Given) -> int:
        if isinstance(sig, _chain):
            return self.chain(sig, given)
        if isinstance(sig, group):
            return self.group(sig, given)
        if isinstance(sig, _chord):
            return self.chord(sig, given)
        if sig.task == _CHUNKS:
            return self.chunks(sig, given)
        if is_wait(sig):
            return self.wait(sig, given)
        if is_saga(sig):
            return self.saga(sig, given)
        if is_each(sig):
            return self.each(sig, given)
        return self.task(sig, given)

    def task(self, sig: Signature, given: _Given) -> int:
        # A signature's attributes are looked up by name, each time: once is enough.
        task, own = sig.task, sig.options
        options = _merged(own, given.options)
        kwargs = dict(sig.kwargs)
        if task in MAPS:
            kwargs["it"] = list(kwargs["it"])
            options.setdefault("route_name", task_name(kwargs.get("task")))
        if sig.immutable:
            literal: tuple[Any, ...] = tuple(sig.args)
            source = None
        else:
            literal = (*given.args, *sig.args)
            kwargs.update(given.kwargs)
            source = given.after if given.value else None
        no = self.add(
            Step(
                no=len(self.steps),
                id=str(own.get("task_id") or new_id()),
                kind=given.kind,
                task=task,
                args=json_of(list(literal), task, "arguments") if literal else "[]",
                kwargs=json_of(kwargs, task, "keyword arguments") if kwargs else "{}",
                options={k: v for k, v in options.items() if k not in _FROZEN_OPTIONS and k not in _TIMES},
                after=given.after,
                on_failure=given.on_failure,
                input=source,
                group_id=options.get("group_id"),
                saga=given.saga,
                **times_of(options, task),
            )
        )
        if given.links or given.errbacks or "link" in options or "link_error" in own:  # else neither finds any
            links, errbacks = given.links_of(sig), given.errbacks_of(sig)
            self.hang(no, given, links, errbacks)
        return no

    def wait(self, sig: Signature, given: _Given) -> int:
        """Add a step that calls no task.  A sleep hands on its one argument; what waits for a signal takes none."""
        wait, options = wait_of(sig), _merged(sig.options, given.options)
        literal, source = tuple(sig.args), None
        if not sig.immutable:
            literal = (*given.args, *sig.args)
            source = given.after if given.value else None
        if not sig.immutable and given.kwargs:
            raise ArgumentError(f"{sig.task} takes no keyword argument {min(given.kwargs)!r} of the canvas around it")
        fallback = None
        if wait.signal is not None:
            source = None
            fallback = None if wait.default is NOT_GIVEN else json_of(wait.default, sig.task, "default")
        elif len(literal) + (source is not None) > 1:
            raise ArgumentError(f"{sig.task} hands on one value, and is given {len(literal) + (source is not None)}")
        elif source is None:
            fallback = json_of(literal[0] if literal else None, sig.task, "argument")
        no = self.add(
            Step(
                no=len(self.steps),
                id=str(sig.options.get("task_id") or new_id()),
                kind=StepKind.WAIT,
                task=sig.task,
                after=given.after,
                on_failure=given.on_failure,
                input=source,
                signal=wait.signal,
                signal_of=wait.of,
                fallback=fallback,
                saga=given.saga,
                **time_of_wait(wait, times_of(options, sig.task)),
            )
        )
        self.hang(no, given, given.links_of(sig), given.errbacks_of(sig))
        return no

    def saga(self, sig: Signature, given: _Given) -> int:
        """Add a saga: a step that has the value of the canvas inside it, whose steps know it by its number."""
        if given.kind is StepKind.ERRBACK:
            raise CanvasError(
                "an errback cannot be a saga, nor have one as a part of it; submit a run of its own from it"
            )
        no = self.add(
            Step(
                no=len(self.steps),
                id=str(sig.options.get("task_id") or new_id()),
                kind=StepKind.SAGA,
                task=sig.task,
                after=given.after,
                on_failure=given.on_failure,
                members=1,
                saga=given.saga,
            )
        )
        inside = replace(
            given.partial(sig), options=given.options_of(sig), links=(), errbacks=(), outermost=False,
            inner=False, saga=no,
        )  # fmt: skip
        out = self.visit(body_of(sig), inside)
        self.steps[out].into, self.steps[out].position = no, 0
        self.hang(no, given, given.links_of(sig), given.errbacks_of(sig))
        return no

    def each(self, sig: Signature, given: _Given) -> int:
        """Add an each: a step of its own task, whose items come into the run once it runs."""
        if given.kind is StepKind.ERRBACK:
            raise CanvasError("an errback cannot be an each, nor have one as a part of it; submit a run of its own")
        if given.kwargs and not sig.immutable:
            raise ArgumentError(f"{EACH} takes no keyword argument {min(given.kwargs)!r} of the canvas around it")
        spec = each_of(sig.kwargs)
        item_of(spec, self.app)
        no = self.task(sig, given)
        step = self.steps[no]
        if spec.items is not None:
            step.input, step.args = None, "[]"
        elif spec.pages is None:
            literal = loads(step.args)
            if len(literal) + (step.input is not None) != 1 or not all(isinstance(one, list) for one in literal):
                raise CanvasError(
                    f"{EACH} goes over one list: that of the step before it, the submit's one argument, or over=..."
                )
        return no

    def chain(self, sig: _chain, given: _Given) -> int:
        parts = self.chain_parts(sig)
        if not parts:
            raise CanvasError("an empty chain has no value; Celery cannot run it either")
        if given.inner and _is_empty_group(sig.tasks[-1]) and not _is_empty_group(parts[-1].sig):
            # An empty group is nothing in a chain; but Task.replace makes a chord of one that comes last.
            parts.append(_Part(self.signature(sig.tasks[-1])))
        links, errbacks = given.links_of(sig), given.errbacks_of(sig)
        # Cloning a chain loses that it was immutable, and Celery clones all but the outermost.
        given = given.partial(sig) if given.outermost else given
        # The chain's options reach its first part only: Celery sends just that one itself.
        given = replace(given, options=given.options_of(sig), outermost=False, inner=False)
        out = -1
        for part in parts:
            own_links = _unique(part.links, links) if part is parts[-1] else part.links
            if own_links or given.links or part.errbacks or errbacks or given.errbacks:
                given = replace(given, links=own_links, errbacks=_unique(part.errbacks, errbacks))
            if isinstance(part.sig, group) and own_links:
                # A chain sets its callbacks as an option of its last part; a group's options replace its members'.
                given = replace(given, links=(), options={**given.options, "link": own_links})
            out = self.visit(part.sig, given)
            given = given.then(out)
        return out

    def chain_parts(self, sig: _chain) -> list[_Part]:
        """Return the chain's parts: nested chains spliced in, empty groups dropped, groups of one unrolled.

        A chain of nothing but empty groups keeps one.  A group followed by anything becomes a chord with what follows
        as its body, as ``_chain.prepare_steps`` does.
        """
        flat: list[_Part] = []
        empty: Signature | None = None
        for raw in sig.tasks:
            part = self.signature(raw)
            if isinstance(part, group):
                members = list(part.tasks)
                if not members:
                    empty = part
                    continue
                if len(members) == 1:
                    part = _chain_of(self.signature(members[0]))
            if isinstance(part, _chain):
                flat.extend(self.spliced(part))
            else:
                flat.append(_Part(part))
        if not flat and empty is not None:
            return [_Part(empty)]
        return self.upgraded(flat)

    def spliced(self, sig: _chain) -> list[_Part]:
        """Return the parts of a nested chain, which take over its callbacks and errbacks."""
        errbacks = _listed(sig.options.get("link_error"))
        parts = [part._replace(errbacks=_unique(part.errbacks, errbacks)) for part in self.chain_parts(sig)]
        if parts:
            parts[-1] = parts[-1]._replace(links=_unique(parts[-1].links, _listed(sig.options.get("link"))))
        return parts

    def upgraded(self, flat: list[_Part]) -> list[_Part]:
        parts: list[_Part] = []
        for part in reversed(flat):
            if isinstance(part.sig, group) and parts:
                body = parts.pop()
                # A failed member fails the body, whose errbacks are called: the group's own join them there.
                body = body._replace(errbacks=_unique(part.errbacks, body.errbacks))
                parts.append(_Part(_upgraded(part.sig, body, self.app)))
            else:
                parts.append(part)
        parts.reverse()
        return parts

    def group(self, sig: group, given: _Given) -> int:
        options, links = given.options_of(sig), _listed(given.options.get("link") or sig.options.get("link"))
        if links:
            options["link"] = links
        # group.link attaches to the first member, immutable: it cannot pass its siblings' values on.
        first_links = tuple(self.signature(link).clone().set(immutable=True) for link in given.links)
        outs = []
        inside = replace(given, options=options, links=first_links, outermost=False, inner=False)
        for part in self.members(sig):
            outs.append(self.visit(part, inside))
            if first_links:
                inside, first_links = replace(inside, links=()), ()
        if given.outermost and len(outs) == 1 and self.steps[outs[0]].kind is StepKind.JOIN:
            return outs[0]  # GroupResult of one chain that ends in a group: Celery returns the inner one
        join = Step(
            no=len(self.steps),
            id=str(sig.options.get("task_id") or new_id()),
            kind=StepKind.JOIN,
            after=given.after,
            on_failure=given.on_failure,
            members=len(outs),
            saga=given.saga,
        )
        for position, out in enumerate(outs):
            member = self.steps[out]
            member.into, member.position, member.group_id = join.no, position, join.id
        return self.add(join)

    def chunks(self, sig: Signature, given: _Given) -> int:
        """Add the group that ``chunks`` stand for.

        Celery does so for chunks that are submitted alone; within a canvas it gives the ids of the group's results, and
        nothing waits for them.  The plan waits, and has the values.
        """
        split = chunks(sig.kwargs["task"], list(sig.kwargs["it"]), sig.kwargs["n"], app=self.app).group()
        inside = replace(given, value=False, args=(), kwargs={}, options=given.options_of(sig), links=(), errbacks=())
        join = self.visit(split, inside)
        self.hang(join, given, given.links_of(sig), given.errbacks_of(sig))
        return join

    def members(self, sig: Signature) -> list[Signature]:
        """Return the members of a group: groups directly inside it are flattened, empty chains dropped."""
        found: list[Signature] = []
        for raw in sig.tasks:
            member = self.signature(raw)
            if isinstance(member, group):
                own = {k: v for k, v in member.options.items() if k not in _FROZEN_OPTIONS}
                inner = self.members(member)
                found.extend(m.clone().set(**own) for m in inner) if own else found.extend(inner)
            elif not (isinstance(member, _chain) and not list(member.tasks)):
                found.append(member)
        return found

    def chord(self, sig: _chord, given: _Given) -> int:
        if sig.body is None:
            raise CanvasError("a chord without a body cannot be submitted; give it one, or submit its header group")
        options = given.options_of(sig)
        links, errbacks = given.links_of(sig), given.errbacks_of(sig)
        header = sig.tasks if isinstance(sig.tasks, group) else group(list(sig.tasks), app=self.app)
        given = given.partial(sig)
        kwargs = {**(sig.kwargs.get("kwargs") or {}), **given.kwargs}
        given = replace(given, kwargs=kwargs, options=options, links=(), errbacks=(), outermost=False, inner=False)
        join = self.group(header, given)
        # A delay is the header's alone: the body comes after it anyway.
        options = {k: v for k, v in options.items() if k not in _DELAYS}
        return self.visit(sig.body, given.then(join, options=options, links=links, errbacks=errbacks))


def _upgraded(header: group, body: _Part, app: Celery) -> _chord:
    """Return the chord that Celery makes of a group followed by ``body`` in a chain."""
    upgraded = _chord(header, body=None, app=app)
    upgraded.kwargs["body"] = body.sig
    if body.links:
        upgraded.options["link"] = list(body.links)
    if body.errbacks:
        upgraded.options["link_error"] = list(body.errbacks)
    return upgraded


def _chain_of(member: Signature) -> _chain:
    single = _chain()
    single.kwargs["tasks"] = [member]
    return single


def _is_empty_group(sig: Any) -> bool:
    return isinstance(sig, group) and not list(sig.tasks)


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return (value,)
    return tuple(value)


def _unique(*groups: Sequence[Any]) -> tuple[Any, ...]:
    """Concatenate, dropping repeats as ``append_to_list_option`` does."""
    found: list[Any] = []
    for items in groups:
        if items:
            found.extend(item for item in items if item not in found)
    return tuple(found)


def _merged(own: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge options as ``Signature._merge`` does: stamps and the group's id stay the signature's own."""
    merged = dict(own)
    if override:
        keep = {"group_id", "stamped_headers", *own.get("stamped_headers", ())}
        merged.update({k: v for k, v in override.items() if v is not None and not (k in keep and k in own)})
    return merged


def task_name(task: Any) -> str | None:
    """Return the name of the task that a signature, its dictionary form, a task or a name stands for."""
    if isinstance(task, str):
        return task
    return task.get("task") if isinstance(task, Mapping) else getattr(task, "name", None)
