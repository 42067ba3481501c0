"""`byrd metrics`: the figures of now for Prometheus, printed once or served."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import click
from sqlalchemy.exc import DBAPIError

from byrd.cli.session import Session, command, print_json, say
from byrd.cli.shapes import metrics_shape
from byrd.errors import ByrdError, ConfigurationError, StoreUnavailableError
from byrd.store.metrics import Metrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

PATH = "/metrics"
_LOOPBACK = "127.0.0.1"
#: A client that sends or takes nothing for so long is cut off.
_CLIENT_SECONDS = 10.0
#: A scrape waits no longer than this for the one before it: Prometheus itself gives up after ten seconds.
_TURN_SECONDS = 5.0


def add_to(group: click.Group) -> None:
    """Add the command to the group."""

    @command(group, "metrics", short_help="Print or serve figures for Prometheus.")
    @click.option("--serve", "address", metavar="[HOST:]PORT", help="Serve them over HTTP, on loopback by default.")
    def metrics(session: Session, *, address: str | None, as_json: bool) -> None:
        """Print how many runs, steps and workers there are now, as Prometheus reads it.

        \b
        byrd metrics                         once, say for node_exporter's textfile collector
        byrd metrics --serve 9464            at http://127.0.0.1:9464/metrics until Ctrl-C or SIGTERM
        byrd metrics --serve 0.0.0.0:9464    on all interfaces
        """
        engine = session.engine(of_app=False)
        if address is not None:
            _serve(address, registry_of(_one_at_a_time(engine.metrics)), as_json=as_json)
        elif as_json:
            print_json(metrics_shape(engine.metrics()))
        else:
            registry = registry_of(engine.metrics)
            from prometheus_client import generate_latest

            click.echo(generate_latest(registry), nl=False)


# -- the figures as Prometheus reads them ------------------------------------------------------------


def registry_of(read: Callable[[], Metrics]) -> CollectorRegistry:
    """Return a registry whose figures are read anew at each collection.

    Raises :class:`ConfigurationError` where ``prometheus-client`` is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry
    except ImportError as exc:
        raise ConfigurationError(
            "`byrd metrics` needs prometheus-client, which is not installed here: "
            'pip install "byrd[metrics]"; `byrd metrics --json` does without'
        ) from exc
    registry = CollectorRegistry()
    registry.register(_Collector(read))
    return registry


class _Collector:
    def __init__(self, read: Callable[[], Metrics]) -> None:
        self._read = read

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return what there is without its figures: to register asks Postgres nothing."""
        return _families(None)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the figures of now."""
        return _families(self._read())


def _families(found: Metrics | None) -> Iterator[GaugeMetricFamily]:
    def gauge(name: str, what: str, values: Callable[[Metrics], Any], label: str | None = None) -> GaugeMetricFamily:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(name, what, labels=None if label is None else [label])
        if found is not None:
            figures = values(found)
            for key, value in figures.items() if label is not None else [(None, figures)]:
                family.add_metric([] if key is None else [key], value)
        return family

    def queues(field: str) -> Callable[[Metrics], dict[str, float]]:
        return lambda m: {name: getattr(queue, field) for name, queue in m.queues.items()}

    yield gauge("byrd_runs", "Runs that have not ended, by status.", lambda m: m.runs, "status")
    yield gauge("byrd_rollbacks_stuck", "Runs with a rollback that waits for an operator.", lambda m: m.rollbacks_stuck)
    yield gauge(
        "byrd_steps", "Steps that are ready (due now, or later), running or waiting.", lambda m: m.steps, "state"
    )
    yield gauge("byrd_queue_steps_due", "Steps that are due, by queue.", queues("steps_due"), "queue")
    yield gauge(
        "byrd_queue_oldest_due_age_seconds",
        "For how long the oldest step of a queue has been due; 0 if none is.",
        queues("oldest_due_seconds"),
        "queue",
    )
    yield gauge("byrd_workers", "Workers whose lease lasts.", lambda m: m.workers)
    yield gauge(
        "byrd_worker_processes", "Processes, threads or greenlets of these workers.", lambda m: m.worker_processes
    )
    yield gauge(
        "byrd_workers_lost", "Workers whose lease is over, with steps not recovered yet.", lambda m: m.workers_lost
    )
    yield gauge(
        "byrd_notices_undelivered", "Notices of stuck rollbacks not delivered yet.", lambda m: m.notices_undelivered
    )


# -- serving -----------------------------------------------------------------------------------------


def _one_at_a_time(read: Callable[[], Metrics]) -> Callable[[], Metrics]:
    """Have scrapes take turns: while Postgres is slow, they must not become more and more."""
    turn = threading.Lock()

    def read_alone() -> Metrics:
        if not turn.acquire(timeout=_TURN_SECONDS):
            raise StoreUnavailableError("Postgres has not answered the scrape before this one yet")
        try:
            return read()
        finally:
            turn.release()

    return read_alone


def _application(registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    from prometheus_client import make_wsgi_app

    scrape = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        def answer(status: str, text: str) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{text}\n".encode()]

        if environ["PATH_INFO"] != PATH:
            return answer("404 Not Found", f"The figures are at {PATH}.")
        if environ["REQUEST_METHOD"] != "GET":
            return answer("405 Method Not Allowed", f"GET {PATH} is all that there is.")
        try:
            found: Iterable[bytes] = scrape(environ, start_response)
        except (ByrdError, DBAPIError) as exc:
            # No figures at all: a failed scrape, for which Prometheus has `up`.
            said = str(exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc).strip()
            return answer("503 Service Unavailable", " ".join(said.split()) or type(exc).__name__)
        return found

    return application


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the standard library
        """Stay quiet: there is a scrape every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, without asking DNS for a name that nobody needs."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away in between; there is nothing else that comes here."""


def _serve(address: str, registry: CollectorRegistry, *, as_json: bool) -> None:
    server = _listen(*_host_and_port(address), _application(registry))
    host = server.server_name
    url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}{PATH}"
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    threading.Thread(target=server.serve_forever, name="byrd-metrics", daemon=True).start()
    if as_json:
        print_json({"event": "started", "url": url}, lines=True)
    else:
        say(f"Serving {url}; Ctrl-C ends it.")
    told.wait()
    server.shutdown()
    server.server_close()
    if as_json:
        print_json({"event": "stopped"}, lines=True)
    else:
        say("Stopped.")


def _host_and_port(address: str) -> tuple[str, int]:
    """Read ``[HOST:]PORT``; a host that has colons is in brackets."""
    # A colon with no host before it means all interfaces elsewhere, which is not to be had by a slip.
    match = re.fullmatch(r"(?:([^\s:\[\]]+):|\[([^\s\[\]]+)\]:)?([0-9]{1,5})", address, re.ASCII)
    if match is None or int(match[3]) > 65535:
        raise ConfigurationError(
            f"--serve {address!r} is no [HOST:]PORT such as 9464, 0.0.0.0:9464 or [::1]:9464; ports are 0 to 65535"
        )
    return match[1] or match[2] or _LOOPBACK, int(match[3])


def _listen(host: str, port: int, application: Callable[..., Iterable[bytes]]) -> WSGIServer:
    try:
        [(family, _, _, _, place), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        kind = type("_Server", (_Server,), {"address_family": family})
        return make_server(str(place[0]), port, application, kind, handler_class=_Handler)
    except (OSError, UnicodeError) as exc:
        said = getattr(exc, "strerror", None) or exc
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {said}; choose another for --serve") from exc
