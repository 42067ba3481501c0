"""``byrd dev``: embedded servers where none are named, and everything in the Procfile."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from byrd.cli.processes import STOP_SECONDS, Ended, Entry, Event, Line, Processes, Stopping, chosen, read_procfile
from byrd.cli.session import DEV_ENV, Session, command, console, print_json
from byrd.cli.setup import migrate_database

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_green")
_ADMIN_PASSWORD = DEV_ENV.parent / "admin-password"
_APP = re.compile(r"\bcelery\s+(?:-A|--app)[\s=]+(\S+)")


def add_to(group: click.Group) -> None:
    """Add the command to the group."""

    @command(group, "dev", short_help="Run everything for development, servers included.")
    @click.option("--procfile", "path", type=click.Path(path_type=Path), default=Path("Procfile"), show_default=True)
    @click.option("--only", metavar="NAME,...", help="Only these processes of the Procfile.")
    def dev(session: Session, *, path: Path, only: str | None, as_json: bool) -> None:
        """Run everything in the Procfile until Ctrl-C.

        Where BYRD_DATABASE_URL or BYRD_BROKER_URL is not set, an embedded Postgres or Valkey is started; its data is
        kept in .byrd/ for the next time.  The database is migrated first.  When a process ends, all do.  Without a
        Procfile, a worker of the app that -A names is run.
        """
        entries = chosen(_entries(session, path), [name.strip() for name in (only or "").split(",") if name.strip()])
        printer = _Printer([entry.name for entry in entries], as_json=as_json)
        with contextlib.ExitStack() as stack:
            env = stack.enter_context(_servers(printer))
            before, after = migrate_database(env["BYRD_DATABASE_URL"])
            if before != after:
                printer.note(f"Byrd's tables are at version {after} now.")
            app = session.app_name or os.environ.get("BYRD_APP") or _app_of(entries)
            if app:
                env["BYRD_APP"] = app
            stack.enter_context(_noted(env))
            printer.opening(entries, env)
            if any(entry.name == "web" for entry in entries) and not os.environ.get("DJANGO_SUPERUSER_USERNAME"):
                env["DJANGO_SUPERUSER_USERNAME"], env["DJANGO_SUPERUSER_PASSWORD"] = "admin", _admin_password()
                printer.note(f"web's login: admin, with the password in {_ADMIN_PASSWORD}", style="bold")
            status = Processes(entries, _environment(env), printer.tell).run()
        printer.note("Everything has ended.")
        if status:
            raise click.exceptions.Exit(status)


def _entries(session: Session, path: Path) -> list[Entry]:
    app = session.app_name or os.environ.get("BYRD_APP")
    if app and not path.exists() and path == Path("Procfile"):
        return [Entry("worker", f"celery -A {shlex.quote(app)} worker --loglevel INFO -E")]
    return read_procfile(path)


@contextlib.contextmanager
def _servers(printer: _Printer) -> Iterator[dict[str, str]]:
    """Yield the URLs, of servers that are there, or of embedded ones that last as long as this block."""
    given = {name: os.environ[name] for name in ("BYRD_DATABASE_URL", "BYRD_BROKER_URL") if os.environ.get(name)}
    with contextlib.ExitStack() as stack:
        if len(given) < 2:
            from byrd import embedded

            folder = embedded.reachable_data_dir(_data_folder())
            printer.note(f"Starting embedded servers; their data is in {_shown(folder)}.")
            if "BYRD_DATABASE_URL" not in given:
                given["BYRD_DATABASE_URL"] = stack.enter_context(embedded.postgres(folder)).url
            if "BYRD_BROKER_URL" not in given:
                given["BYRD_BROKER_URL"] = stack.enter_context(embedded.valkey(folder)).url
        yield given


def _data_folder() -> Path:
    folder = DEV_ENV.parent
    folder.mkdir(mode=0o711, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    return folder


@contextlib.contextmanager
def _noted(env: dict[str, str]) -> Iterator[None]:
    """Note the servers in .byrd/env, so that `byrd ...` in another terminal of this folder finds them."""
    _data_folder()
    DEV_ENV.unlink(missing_ok=True)
    descriptor = os.open(DEV_ENV, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
    try:
        yield
    finally:
        DEV_ENV.unlink(missing_ok=True)


def _admin_password() -> str:
    """Return the password of the admin pages' development login, made once for this folder."""
    if not _ADMIN_PASSWORD.exists():
        descriptor = os.open(_ADMIN_PASSWORD, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(12))
    return _ADMIN_PASSWORD.read_text(encoding="utf-8").strip()


def _environment(env: dict[str, str]) -> dict[str, str]:
    # The commands of this very Python, also where its environment was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **env, "PATH": path, "PYTHONUNBUFFERED": "1"}


def _app_of(entries: Sequence[Entry]) -> str | None:
    """Return the app that the Procfile's own commands name."""
    return next((match[1] for entry in entries if (match := _APP.search(entry.command))), None)


def _shown(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        return f"{folder.relative_to(Path.cwd())}/"
    return f"{folder}/"


class _Printer:
    """Writes what happens: each line under the name of its process, or as JSON."""

    def __init__(self, names: Sequence[str], *, as_json: bool) -> None:
        self.as_json = as_json
        self._width = max([len(name) for name in names] + [len("byrd")])
        self._colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
        self._ending = False

    def opening(self, entries: Sequence[Entry], env: dict[str, str]) -> None:
        """Say what starts, and where to look."""
        urls = _urls([entry.name for entry in entries])
        if self.as_json:
            print_json({"event": "starting", "processes": [e.name for e in entries], "urls": urls}, lines=True)
            return
        self.note(f"Starting {', '.join(entry.name for entry in entries)}; Ctrl-C ends all.")
        for name, url in urls.items():
            self.note(f"{name}: {url}", style="bold")
        if "BYRD_APP" in env:
            self.note("In another terminal, here: byrd runs, byrd workers, byrd doctor", style="bold")
            self.note(f"For other programs there: . {DEV_ENV}")

    def note(self, text: str, *, style: str = "") -> None:
        """Write a line of our own."""
        if self.as_json:
            print_json({"event": "note", "text": text}, lines=True)
        else:
            self._write("byrd", "bold white", Text(text, style=style))

    def tell(self, event: Event) -> None:
        """Write what a process wrote, or that it has ended."""
        if isinstance(event, Line):
            if self.as_json:
                print_json({"event": "line", "process": event.name, "text": event.text}, lines=True)
            else:
                self._write(event.name, self._colours[event.name], Text.from_ansi(event.text))
            return
        if isinstance(event, Stopping):
            self._stopping(event)
        else:
            self._ended(event)

    def _stopping(self, event: Stopping) -> None:
        self._ending = True
        if self.as_json:
            print_json({"event": "stopping", "processes": event.names}, lines=True)
        elif event.names:
            seconds = f"{STOP_SECONDS:.0f} s"
            self.note(
                f"Stopping {', '.join(event.names)} within {seconds}; Ctrl-C (again) ends all at once.", style="bold"
            )

    def _ended(self, event: Ended) -> None:
        if self.as_json:
            print_json({"event": "ended", "process": event.name, "status": event.status}, lines=True)
            return
        how = "ended" if event.status == 0 else f"ended with status {event.status}"
        style = "bold red" if event.status and not self._ending else "bold"
        self._write(event.name, self._colours[event.name], Text(how, style=style))

    def _write(self, name: str, style: str, text: Text) -> None:
        out: Console = console()
        out.print(Text.assemble((f"{name:<{self._width}} │ ", style), text), soft_wrap=True)


def _urls(names: Sequence[str]) -> dict[str, str]:
    """Return what to open in a browser, for the processes that the repository's own Procfile has."""
    known = {
        "web": f"http://{os.environ.get('BYRD_WEB_BIND') or '127.0.0.1:8000'}/",
        "flower": f"http://{os.environ.get('FLOWER_ADDRESS', '127.0.0.1')}:{os.environ.get('FLOWER_PORT', '5555')}/",
    }
    return {name: url for name, url in known.items() if name in names}
