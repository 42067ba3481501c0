"""Serves the rival's site on loopback, and keeps count of its visitors, so that politeness can be checked.

Speaks what a real site speaks: robots.txt with a crawl delay, sitemap.xml, entity tags, Last-Modified and 304.
The version is switched at run time by `server.version = 2`, or by `POST /_admin/version` with `{"version": 2}`.
"""

import json
import sys
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import format_datetime, parsedate_to_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, Self, cast
from xml.sax.saxutils import escape

from tasks.rival.content import HIDDEN_PAGES, Site, SitePage, load_site


@dataclass(frozen=True)
class Traffic:
    """What the site saw since it started, or since `reset_traffic`."""

    requests: Mapping[str, int]
    """How often each path was asked for."""
    statuses: Mapping[int, int]
    """How many answers of each status were made; whether a visitor stayed until all of it was sent is not known."""
    peak_concurrency: int
    """The most answers that were being made at once, from the request on; to send them is not counted."""
    shortest_gap: float
    """Seconds between the two closest page requests, as they arrived (infinite for fewer than two)."""
    busiest_second: int
    """The most page requests that arrived within any second."""


class RivalServer:
    """The site on a free loopback port; a context manager.

    `crawl_delay` goes into robots.txt; `latency` is how long each answer takes, in seconds.
    """

    def __init__(self, *, version: int = 1, port: int = 0, crawl_delay: float = 0.0, latency: float = 0.0) -> None:
        self._site = load_site(version)
        self._crawl_delay = crawl_delay
        self.latency = latency
        self._lock = threading.Lock()
        self._open = 0
        self.reset_traffic()
        self._http = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="rival", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def site(self) -> Site:
        return self._site

    @property
    def version(self) -> int:
        return self._site.version

    @version.setter
    def version(self, version: int) -> None:
        self._site = load_site(version)

    @property
    def page_requests(self) -> int:
        """How many pages were asked for; robots.txt and the sitemap are none."""
        return len(self._arrivals)

    @property
    def traffic(self) -> Traffic:
        with self._lock:
            arrivals = self._arrivals
            gaps = [later - earlier for earlier, later in pairwise(arrivals)]
            busiest = max((bisect(arrivals, start + 1) - index for index, start in enumerate(arrivals)), default=0)
            shortest = min(gaps, default=float("inf"))
            return Traffic(dict(self._requests), dict(self._statuses), self._peak, shortest, busiest)

    def reset_traffic(self) -> None:
        with self._lock:
            self._requests: Counter[str] = Counter()
            self._statuses: Counter[int] = Counter()
            self._arrivals: list[float] = []
            self._peak = self._open

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # What the request handlers call.

    def arrived(self, path: str) -> None:
        with self._lock:
            self._requests[path] += 1
            self._open += 1
            self._peak = max(self._peak, self._open)
            if path in self._site.pages:
                self._arrivals.append(time.monotonic())

    def answered(self, status: int) -> None:
        with self._lock:
            self._open -= 1
            self._statuses[status] += 1

    def robots(self) -> str:
        delay = f"Crawl-delay: {self._crawl_delay:g}\n" if self._crawl_delay else ""
        return f"User-agent: *\nDisallow: /preview/\nDisallow: /_admin/\n{delay}\nSitemap: {self.url}/sitemap.xml\n"

    def sitemap(self) -> str:
        entries = "".join(
            f"<url><loc>{escape(self.url + page.path)}</loc>"
            f"<lastmod>{page.last_modified.isoformat(timespec='seconds')}</lastmod></url>\n"
            for page in self._site.pages.values()
        )
        namespace = "http://www.sitemaps.org/schemas/sitemap/0.9"
        return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{namespace}">\n{entries}</urlset>\n'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], rival: RivalServer) -> None:
        self.rival = rival
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who hangs up, or is killed, is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Corvane"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 30

    @property
    def rival(self) -> RivalServer:
        return cast("_Server", self.server).rival

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        self.rival.arrived(path)
        try:
            if self.rival.latency:
                time.sleep(self.rival.latency)
            answer = self._answer(path)
            status = answer[0]
        finally:  # before it is sent: who has the answer may ask for the counts, or for the next page
            self.rival.answered(status)
        self._send(*answer)

    do_HEAD = do_GET  # noqa: N815 - the name is the protocol's

    def do_POST(self) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1024))
        if self.path != "/_admin/version":
            self._send(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain; charset=utf-8")
            return
        try:
            self.rival.version = json.loads(body)["version"]
        except (ValueError, KeyError, TypeError) as error:
            self._send(HTTPStatus.BAD_REQUEST, f"{error}\n".encode(), "text/plain; charset=utf-8")
            return
        self._send(HTTPStatus.OK, json.dumps({"version": self.rival.version}).encode(), "application/json")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing: the counts in `traffic` are the log."""

    def _answer(self, path: str) -> tuple[HTTPStatus, bytes, str | None, Mapping[str, str]]:
        """The status, the body, its type, and the headers that are the page's own."""
        if path == "/robots.txt":
            return HTTPStatus.OK, self.rival.robots().encode(), "text/plain; charset=utf-8", {}
        if path == "/sitemap.xml":
            return HTTPStatus.OK, self.rival.sitemap().encode(), "application/xml", {}
        page = self.rival.site.pages.get(path)
        if page is None:
            body = b"<!doctype html><title>Not found</title><p>There is no such page."
            return HTTPStatus.NOT_FOUND, body, "text/html; charset=utf-8", {}
        validators = {"ETag": page.etag, "Last-Modified": format_datetime(page.last_modified, usegmt=True)}
        if path in HIDDEN_PAGES:
            validators["X-Robots-Tag"] = "noindex"
        if self._is_fresh(page):
            return HTTPStatus.NOT_MODIFIED, b"", None, validators
        return HTTPStatus.OK, page.html, "text/html; charset=utf-8", validators

    def _is_fresh(self, page: SitePage) -> bool:
        """Whether the visitor holds this very page already (RFC 9110: an entity tag outranks a date)."""
        tags = self.headers.get("If-None-Match")
        if tags is not None:
            return page.etag in {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        since = self.headers.get("If-Modified-Since")
        try:
            return since is not None and page.last_modified <= parsedate_to_datetime(since)
        except (ValueError, TypeError):
            return False

    def _send(
        self, status: HTTPStatus, body: bytes, content_type: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if content_type is not None:
            self.send_header("Content-Type", content_type)
        if status is not HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
