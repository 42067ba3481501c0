"""Limits over the whole cluster: how a task declares one, and which key a call has.  Pure; Postgres counts."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from byrd.errors import LimitError, LimitKeyError

#: The option of a task: ``@app.task(byrd_limit=byrd.Limit("10/s"))``.
OPTION: Final = "byrd_limit"
#: What a limit may be called.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")
_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MOST = 1_000_000
#: An index has to hold it.
_LONGEST_KEY = 500


@dataclass(frozen=True, slots=True)
class Limit:
    """How many calls of a task may start in a time (``rate``), and run at once (``concurrency``), over all workers.

    ``rate``: ``"10/s"``, ``"100/m"``, ``"5/h"`` or ``"1000/d"``, evenly spread; ``burst`` calls may come at once after
    a quiet time.
    ``key``: what is counted apart: the name of an argument of the task, or a function of the call's arguments.  It is
    a text or a whole number; None is not limited.  Without ``key`` all calls are counted together.
    ``name``: what the limit is called, and shared by; the task's own name unless it is given.

    Raises :class:`LimitError` for what cannot be a limit.
    """

    rate: str | None = None
    burst: int = 1
    concurrency: int | None = None
    key: str | Callable[..., Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.rate is None and self.concurrency is None:
            raise LimitError("a limit needs a rate, a concurrency, or both")
        if self.rate is not None:
            spacing(self.rate)
        elif self.burst != 1:
            raise LimitError("a limit without a rate has no burst")
        checked_count(self.burst, "burst")
        if self.concurrency is not None:
            checked_count(self.concurrency, "concurrency")
        key: Any = self.key
        if not (key is None or callable(key) or (isinstance(key, str) and key.isidentifier())):
            raise LimitError(f"key={key!r:.80} is neither the name of an argument nor a function of the arguments")
        if self.name is not None:
            checked_name(self.name)

    @property
    def every_seconds(self) -> float:
        """The time from one call to the next; 0 without a rate."""
        return 0.0 if self.rate is None else spacing(self.rate)

    @property
    def counts(self) -> tuple[str | None, int, int | None]:
        """What the tasks that share a limit must agree on."""
        return self.rate, self.burst, self.concurrency


def spacing(rate: Any) -> float:
    """Return the seconds from one call to the next at a rate; raise :class:`LimitError` for what is no rate."""
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    number = float(found[1]) if found else 0.0
    if found is None or not 0 < number <= _MOST:
        raise LimitError(f"the rate {rate!r:.80} is not like 10/s, 100/m, 5/h or 1000/d, with a number above 0")
    return _SECONDS[found[2]] / number


def checked_count(value: Any, what: str, *, least: int = 1) -> int:
    """Return a whole number; raise :class:`LimitError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise LimitError(f"{what}={value!r:.80} is not a whole number from {least} to {_MOST:,}")
    return value


def checked_name(name: Any) -> str:
    """Return the name of a limit; raise :class:`LimitError` for what cannot be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LimitError(f"the name of a limit is 1 to 200 letters, digits or any of . : - / _, not {name!r:.80}")
    return name


def limit_of(task: Any) -> Limit | None:
    """Return the limit of a task, with its name; None when it has none."""
    found: Limit | None = getattr(task, OPTION, None)
    if found is None or found.name is not None:
        return found
    return replace(found, name=task.name)


def check_declaration(task: Any, others: Mapping[str, Limit]) -> None:
    """Raise :class:`LimitError` when what a task declares is no limit, has a key that its calls have not, or is another
    than that of the same name among ``others`` (by task).
    """
    found = getattr(task, OPTION, None)
    if found is not None and not isinstance(found, Limit):
        raise LimitError(f"the task {task.name!r}: {OPTION}={found!r:.80} is no byrd.Limit(...)")
    limit = limit_of(task)
    if limit is None:
        return
    if isinstance(limit.key, str):
        parameters = inspect.signature(task.run).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        named = parameters.get(limit.key)
        if inspect.Parameter.VAR_KEYWORD not in kinds and (named is None or named.kind is named.VAR_POSITIONAL):
            raise LimitError(
                f"the task {task.name!r} is limited by {limit.key!r}, but has no such argument; it has "
                f"{', '.join(parameters) or 'none'}"
            )
    for name, other in others.items():
        if name != task.name and other.name == limit.name and other.counts != limit.counts:
            raise LimitError(
                f"the tasks {task.name!r} and {name!r} share the limit {limit.name!r}, but declare it differently"
            )


def key_of(limit: Limit, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the key of a call of ``run``; None when it is not limited.

    Raises :class:`LimitKeyError` when there is none to be had.
    """
    if limit.key is None:
        return ""
    try:
        found = limit.key(*args, **kwargs) if callable(limit.key) else _argument(limit.key, run, args, kwargs)
    except Exception as exc:
        raise LimitKeyError(f"the limit {limit.name!r} has no key for this call: {type(exc).__name__}: {exc}") from exc
    return checked_key(limit.name, found)


def checked_key(name: str | None, found: Any) -> str | None:
    """Return what a key is counted by; raise :class:`LimitKeyError` for what cannot be one."""
    if found is None:
        return None
    if not isinstance(found, str | int) and not (isinstance(found, float) and math.isfinite(found)):
        raise LimitKeyError(f"the limit {name!r} has a key that is neither a text nor a number: {found!r:.80}")
    key = str(found)
    if len(key) > _LONGEST_KEY or "\0" in key or not _is_text(key):
        raise LimitKeyError(
            f"the limit {name!r} has a key of more than {_LONGEST_KEY} characters, or one that is no text: {key!r:.80}"
        )
    return key


def _argument(name: str, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bound = inspect.signature(run).bind(*args, **kwargs)
    bound.apply_defaults()
    if name in bound.arguments:
        return bound.arguments[name]
    return kwargs[name]


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
