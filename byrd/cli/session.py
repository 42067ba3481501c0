"""What every command shares: which app it speaks of, where output goes, and how errors look."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import click
from celery import Celery
from celery import _state as celery_state
from celery.app.utils import find_app
from celery.exceptions import TimeoutError as CeleryTimeoutError
from rich.console import Console
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from byrd.engine import Byrd
from byrd.errors import ByrdError, ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])
#: A command that Postgres does not answer says so soon; the engine itself is more patient.
_PATIENCE_SECONDS = 3.0
#: Where `byrd dev` notes its servers, for commands in other terminals of the same folder.
DEV_ENV = Path(".byrd") / "env"
_DEV_NAMES = frozenset({"BYRD_DATABASE_URL", "BYRD_BROKER_URL", "BYRD_APP"})
#: Lines that a program reads are not wrapped or cut to some terminal's width.
_WIDTH_OF_PIPES = 200


class Session:
    """One call of the command line."""

    def __init__(self, app_name: str | None, celery_app: Celery | None) -> None:
        self.app_name = app_name
        # Without its -A, `celery byrd ...` has an app that nobody asked for.
        self._celery_app = None if celery_app is default_app() else celery_app
        self._engine: Byrd | None = None

    @property
    def wants_app(self) -> str | None:
        """The app that was asked for: ``-A``, else ``BYRD_APP``."""
        _read_dev_env()
        return self.app_name or os.environ.get("BYRD_APP") or None

    @property
    def names_app(self) -> bool:
        """True unless nobody said which app is meant."""
        return self._celery_app is not None or self.wants_app is not None

    def engine(self, *, of_app: bool = True, patience: float = _PATIENCE_SECONDS) -> Byrd:
        """Return the app's engine.

        ``of_app=False``: for what only reads from the database, an engine without an app will do.
        """
        if self._engine is None:
            self._engine = self._find(of_app=of_app)
            self._engine.runtime.store.patience = patience
        return self._engine

    def database_url(self) -> Any:
        """Return the database's URL, from the environment alone if it is there: migrating needs no app."""
        _read_dev_env()
        return os.environ.get("BYRD_DATABASE_URL") or self.engine(of_app=False).runtime.store.url

    def _find(self, *, of_app: bool) -> Byrd:
        _read_dev_env()
        if self._celery_app is not None and self.app_name is None:
            return _engine_of(self._celery_app, "celery -A")
        if self.wants_app:
            return _engine_of(load_app(self.wants_app), self.wants_app)
        if of_app:
            raise ConfigurationError(
                "which Celery app? Name the module that has it: `byrd -A shop.app ...`, or set BYRD_APP=shop.app"
            )
        engine = Byrd(Celery("byrd", set_as_current=False))
        click.get_current_context().call_on_close(engine.close)
        return engine


def _read_dev_env() -> None:
    """Find the servers of a `byrd dev` that runs in this folder, unless the environment names others."""
    if "BYRD_DATABASE_URL" in os.environ or not DEV_ENV.is_file() or DEV_ENV.stat().st_uid != os.geteuid():
        return
    for line in DEV_ENV.read_text(encoding="utf-8").splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name in _DEV_NAMES:
            os.environ.setdefault(name, "".join(shlex.split(value)))


def default_app() -> Celery | None:
    """Return the app that Celery makes up where none is named."""
    found: Celery | None = celery_state.default_app
    return found


def load_app(name: str) -> Celery:
    """Import the app ``module[:attribute]``, as ``celery -A`` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = find_app(name)
    except ByrdError:
        raise
    except ModuleNotFoundError as exc:
        inside = "" if exc.name and name.startswith(exc.name) else f" (imported by {name})"
        raise ConfigurationError(f"there is no module {exc.name!r}{inside} here; -A takes module[:attribute]") from exc
    except AttributeError as exc:
        raise ConfigurationError(f"{name} has no Celery app in it: {exc}") from exc
    except Exception as exc:
        raise ConfigurationError(f"{name} cannot be imported: {type(exc).__name__}: {exc}{_place(exc)}") from exc
    if not isinstance(found, Celery):
        raise ConfigurationError(f"{name} is no Celery app but a {type(found).__name__}")
    return found


def _engine_of(app: Celery, name: str) -> Byrd:
    app.loader.import_default_modules()
    app.finalize(auto=True)
    engine = getattr(app, "byrd", None)
    if not isinstance(engine, Byrd):
        raise ConfigurationError(
            f"the app {app.main or 'default'!r} ({name}) has no engine: call byrd.Byrd(app) where the app is made"
        )
    return engine


def _place(exc: BaseException) -> str:
    step, place = exc.__traceback__, ""
    while step is not None:
        place = f" ({step.tb_frame.f_code.co_filename}, line {step.tb_lineno})"
        step = step.tb_next
    return place


# -- commands --------------------------------------------------------------------------------------


class Command(click.Command):
    """A command whose errors are one clear line, or JSON with ``--json``."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments."""
        as_json = "--json" in args
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as exc:
            if not as_json:
                raise
            raise _misused(exc) from exc

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ByrdError, CeleryTimeoutError, DBAPIError) as exc:
            fail(exc, as_json=bool(ctx.params.get("as_json")))
        except click.UsageError as exc:
            if not ctx.params.get("as_json"):
                raise
            raise _misused(exc) from exc


def _misused(exc: click.UsageError) -> click.exceptions.Exit:
    """Print what was wrong with the arguments as JSON; return what ends the process."""
    print_json({"error": {"type": "UsageError", "message": exc.format_message()}})
    return click.exceptions.Exit(2)


def command(group: click.Group, name: str, **settings: Any) -> Callable[[F], click.Command]:
    """Add a command to a group, with the options that each has."""

    def decorate(function: F) -> click.Command:
        function = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)
        function = click.option(
            "-A", "--app", "app_name", metavar="MODULE[:ATTR]", hidden=True, expose_value=False, callback=_choose_app
        )(function)
        return group.command(name, cls=Command, **settings)(click.pass_obj(function))

    return decorate


def _choose_app(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.obj = Session(value, None)


def fail(exc: Exception, *, as_json: bool) -> None:
    """Print an error and end the process with status 1."""
    original = getattr(exc, "orig", None)
    message = str(original if original is not None else exc).strip() or type(exc).__name__
    if as_json:
        print_json({"error": {"type": type(exc).__name__, "message": message}})
    else:
        console(stderr=True).print(Text.assemble(("Error: ", "bold red"), (message, "red")), soft_wrap=True)
    raise click.exceptions.Exit(1)


# -- output ----------------------------------------------------------------------------------------


def console(*, stderr: bool = False) -> Console:
    """Return where to print: made anew each time, for tests and pipes exchange the streams."""
    stream = _stream(stderr=stderr)
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_PIPES
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def say(*parts: str | tuple[str, str]) -> None:
    """Print a sentence, wrapped for people only; a part may be (text, style)."""
    out = console()
    out.print(Text.assemble(*parts), soft_wrap=not out.is_terminal)


def print_json(value: Any, *, lines: bool = False) -> None:
    """Print JSON; ``lines`` puts it on one line."""
    print(json_text(value, lines=lines), file=_stream(), flush=True)


def json_text(value: Any, *, lines: bool = False) -> str:
    """Return a value as the JSON that commands print."""
    return json.dumps(value, default=_as_json, ensure_ascii=False, indent=None if lines else 2)


def _stream(*, stderr: bool = False) -> IO[str]:
    stream: IO[str] = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a symbol is no reason to fail
    return stream


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
