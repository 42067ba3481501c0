"""How often and when a step is tried again, and how long it may take: what a task declares.  Pure.

A policy is frozen in the plan when a run is submitted, as JSON among the step's options; a later deploy changes runs
that are submitted from then on.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self, TypeVar

from byrd.errors import RetryPolicyError, TimeoutPolicyError, pause_of

#: The options of a task, of a signature, and of a step: ``@app.task(byrd_retry=..., byrd_timeouts=...)``.
RETRY: Final = "byrd_retry"
TIMEOUTS: Final = "byrd_timeouts"
#: In the JSON of a policy that was given to ``submit``, for the steps that have none of their own.
DEFAULT: Final = "default"
_LONGEST_SECONDS = 1e8
_MOST_ATTEMPTS = 1_000_000
P = TypeVar("P")
#: The name of a class, with its module: ``requests.exceptions.ConnectionError``.
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class Retry:
    """When a step that has failed is tried again.

    ``max_attempts``: attempts in all, the first included; None: as many as the budget allows.
    ``budget``: seconds in all, from the start of the first attempt that failed to the start of the last one; None: no
    end.  ``first``, ``factor``, ``cap``: the pause before the second attempt, by how much each is longer than the one
    before it, and the longest, in seconds.  ``jitter``: between half of the pause and all of it, by chance.
    ``never``: exceptions with which the step fails at once: classes, whose subclasses count, or their names
    (``"requests.exceptions.InvalidURL"``; a name without a dot is one of Python's own).

    An exception that has an attribute ``retry_after``, in seconds, a timedelta or the text of HTTP's header of that
    name (:class:`byrd.RetryLater`, say), says the pause itself.  Raises :class:`RetryPolicyError` for what cannot be a
    policy.
    """

    max_attempts: int | None = 5
    budget: float | None = None
    first: float = 1.0
    factor: float = 2.0
    cap: float = 300.0
    jitter: bool = True
    never: tuple[type[BaseException] | str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_attempts is not None and not _is_whole(self.max_attempts, 1, _MOST_ATTEMPTS):
            raise RetryPolicyError(
                f"max_attempts={self.max_attempts!r:.80} is not a whole number from 1 to {_MOST_ATTEMPTS:,}, or None"
            )
        if self.budget is not None and not _is_number(self.budget, 0, _LONGEST_SECONDS, open_end=True):
            raise RetryPolicyError(f"budget={self.budget!r:.80} is not a number of seconds above 0, or None")
        for name in ("first", "cap"):
            if not _is_number(getattr(self, name), 0, _LONGEST_SECONDS):
                raise RetryPolicyError(f"{name}={getattr(self, name)!r:.80} is not a number of seconds")
        if not _is_number(self.factor, 1, 1000):
            raise RetryPolicyError(f"factor={self.factor!r:.80} is not a number from 1 to 1,000")
        if not isinstance(self.jitter, bool):
            raise RetryPolicyError(f"jitter={self.jitter!r:.80} is neither True nor False")
        object.__setattr__(self, "never", _exception_names(self.never))

    def pause(
        self, names: Iterable[str], tried: int, *, elapsed: float, own: float | None = None, chance: float | None = None
    ) -> float | None:
        """Return the seconds until the next attempt; None when there is to be none.

        ``names``: the exception's class and its bases, as :func:`names_of` has them.  ``tried``: attempts that count.
        ``elapsed``: seconds since the first of them began.  ``own``: the pause that the exception asks for.
        """
        if not set(self.never).isdisjoint(names):
            return None
        if self.max_attempts is not None and tried >= self.max_attempts:
            return None
        if chance is None:
            chance = random.random()  # noqa: S311 - no secret
        pause = own if own is not None else self._backoff(tried, chance)
        if self.budget is not None and elapsed + pause > self.budget:
            return None
        return pause

    def _backoff(self, tried: int, chance: float) -> float:
        try:
            pause = min(self.cap, self.first * self.factor ** max(0, tried - 1))
        except OverflowError:
            pause = self.cap
        return pause * (0.5 + chance / 2) if self.jitter else pause

    def __json__(self) -> dict[str, Any]:
        """Return it as it is frozen in a plan; kombu's JSON, too, asks for this."""
        return {**asdict(self), "never": list(self.never)}

    @classmethod
    def of(cls, found: Any) -> Self:
        """Return the policy that is meant: one, or its JSON form."""
        return _policy_of(cls, found, RETRY, RetryPolicyError)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a step may take, in seconds; None: as long as it does.

    ``start_to_close``: one attempt, from its start to its end.  ``schedule_to_start``: from when the step is ready, and
    due, to when an attempt starts.  ``heartbeat``: a running attempt that saves no checkpoint, nor calls
    ``self.heartbeat()``, for so long is hung.

    Raises :class:`TimeoutPolicyError` for what cannot be a time-out.
    """

    start_to_close: float | None = None
    schedule_to_start: float | None = None
    heartbeat: float | None = None

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(value is None for value in given.values()):
            raise TimeoutPolicyError(f"time-outs need one of {', '.join(given)}")
        for name, value in given.items():
            if value is not None and not _is_number(value, 0, _LONGEST_SECONDS, open_end=True):
                raise TimeoutPolicyError(f"{name}={value!r:.80} is not a number of seconds above 0, or None")

    @property
    def of_attempts(self) -> bool:
        """True when a running attempt may be ended: then others must not run in the same message."""
        return self.start_to_close is not None or self.heartbeat is not None

    def __json__(self) -> dict[str, Any]:
        """Return it as it is frozen in a plan; kombu's JSON, too, asks for this."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, found: Any) -> Self:
        """Return the time-outs that are meant: some, or their JSON form."""
        return _policy_of(cls, found, TIMEOUTS, TimeoutPolicyError)


def retry_of(options: Mapping[str, Any]) -> Retry | None:
    """Return the retry policy among a step's options."""
    found = options.get(RETRY)
    return None if found is None else Retry.of(found)


def timeouts_of(options: Mapping[str, Any]) -> Timeouts | None:
    """Return the time-outs among a step's options."""
    found = options.get(TIMEOUTS)
    return None if found is None else Timeouts.of(found)


def freeze(options: dict[str, Any], default: Retry | None = None) -> None:
    """Put the policies among a step's options in the form in which a plan holds them.

    ``default``: the retry policy of a step that says nothing of it.  Raises :class:`RetryPolicyError` or
    :class:`TimeoutPolicyError` for what is no policy.
    """
    if RETRY not in options and default is not None:
        options[RETRY] = {**default.__json__(), DEFAULT: True}
    elif options.get(RETRY) is not None:
        options[RETRY] = {**_kept(options[RETRY]), **Retry.of(options[RETRY]).__json__()}
    else:
        options.pop(RETRY, None)
    if (timeouts := timeouts_of(options)) is None:
        options.pop(TIMEOUTS, None)
        return
    options[TIMEOUTS] = timeouts.__json__()
    if timeouts.start_to_close is not None:  # Celery's own machinery ends it, where a pool has some
        options["time_limit"] = min(timeouts.start_to_close, options.get("time_limit") or math.inf)


def default_of(options: Mapping[str, Any]) -> Retry | None:
    """Return the retry policy that a step has from its ``submit``, for what takes its place to have it, too."""
    found = options.get(RETRY)
    return Retry.of(found) if isinstance(found, Mapping) and found.get(DEFAULT) else None


def check_declaration(task: Any) -> None:
    """Raise :class:`RetryPolicyError` or :class:`TimeoutPolicyError` for what a task declares that is no policy."""
    for option, read in ((RETRY, Retry.of), (TIMEOUTS, Timeouts.of)):
        found = getattr(task, option, None)
        if found is not None:
            try:
                read(found)
            except (RetryPolicyError, TimeoutPolicyError) as exc:
                raise type(exc)(f"the task {task.name!r}: {exc}") from None


def names_of(kind: type[BaseException]) -> tuple[str, ...]:
    """Return the names of an exception's class and of its bases, as ``never`` has them."""
    return tuple(_full_name(one) for one in kind.__mro__ if issubclass(one, BaseException))


def own_pause(exc: BaseException) -> float | None:
    """Return the pause that an exception asks for by ``retry_after``; None when it does not, or says no time."""
    try:
        found: Any = getattr(exc, "retry_after", None)
    except Exception:  # noqa: BLE001 - a property of the user's own may raise anything
        return None
    return pause_of(found)


def _policy_of(cls: type[P], found: Any, option: str, error: Callable[[str], Exception]) -> P:
    if isinstance(found, cls):
        return found
    if not isinstance(found, Mapping):
        raise error(f"{option}={found!r:.80} is no byrd.{cls.__name__}(...)")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in found.items() if name in known})


def _kept(found: Any) -> dict[str, Any]:
    return {DEFAULT: True} if isinstance(found, Mapping) and found.get(DEFAULT) else {}


def _exception_names(never: Any) -> tuple[str, ...]:
    if isinstance(never, str | type):
        never = (never,)
    if not isinstance(never, Iterable):
        raise RetryPolicyError(f"never={never!r:.80} are no exceptions, nor names of some")
    return tuple(_exception_name(one) for one in never)


def _exception_name(one: Any) -> str:
    if isinstance(one, type) and issubclass(one, BaseException):
        return _full_name(one)
    if isinstance(one, str) and _NAME.fullmatch(one):
        return one if "." in one else f"builtins.{one}"
    raise RetryPolicyError(
        f"never={one!r:.80} is neither an exception's class nor the name of one, like 'package.module.Error'"
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float, most: float, *, open_end: bool = False) -> bool:
    """Tell whether it is a number in this range; ``open_end``: the least is none of it.  NaN is in no range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (least < value if open_end else least <= value) and value <= most
