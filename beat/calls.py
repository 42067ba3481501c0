"""What a schedule submits, as its periodic task's `args` and `kwargs` hold it: [workflow, *args] and {...}, in JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from byrd.errors import ArgumentError

# Names that `engine.submit` takes itself.
_TAKEN = frozenset({"canvas", "connection", "key", "timeout"})


@dataclass(frozen=True)
class Call:
    """A workflow's name and its arguments."""

    workflow: str
    args: list[Any]
    kwargs: dict[str, Any]


def read_call(task: Any) -> Call:
    """The call of a periodic task; ArgumentError if its row holds none."""
    args, kwargs = read_json(task.args or "[]"), read_json(task.kwargs or "{}")
    if not (isinstance(args, list) and args and isinstance(args[0], str)):
        raise ArgumentError(f"The arguments of schedule {task.name!r} have to be a JSON list that begins with a name.")
    if not isinstance(kwargs, dict):
        raise ArgumentError(f"The keyword arguments of schedule {task.name!r} have to be a JSON object.")
    call = Call(args[0], args[1:], kwargs)
    check_call(call)
    return call


def check_call(call: Call) -> None:
    """ArgumentError if the call cannot be passed on to ``engine.submit``."""
    if taken := sorted(_TAKEN & call.kwargs.keys()):
        raise ArgumentError(f"A schedule cannot pass {taken[0]!r} to its workflow: submit() takes it itself.")


def check_signature(call: Call, workflow: Callable[..., Any]) -> None:
    """ArgumentError if the workflow does not take these arguments."""
    signature = inspect.signature(workflow)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        shown = f"{call.workflow}{inspect.Signature(bare)}"
        raise ArgumentError(f"{shown} cannot be called with the arguments of this schedule: {error}.") from None


def read_json(text: str) -> Any:
    """What `text` says in JSON; ArgumentError if Postgres could not hold it either."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ArgumentError(f"This is not JSON: {error.msg} at {where}.") from None
    for part in _strings(value):
        if "\0" in part or not _encodable(part):
            raise ArgumentError(f"A string holds a character that Postgres cannot store: {part!r}.")
    return value


def _refuse_constant(name: str) -> Any:
    raise ArgumentError(f"{name} is not JSON. Use null, or a number.")


def _encodable(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
