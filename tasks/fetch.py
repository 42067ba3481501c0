"""Polite and safe reading of other people's web sites.

Polite: robots.txt is honoured, what has not changed is not sent again, and requests to one host keep their distance
over all workers, by slots booked in Postgres. Safe: only public addresses are connected to, unless a setting allows
more, and the address that was checked is the one that is used; every redirect is checked anew; size and time are
bounded.

    FetchError
    ├── AddressRefusedError   the address is not public, or not one that a page can have
    ├── DisallowedError       robots.txt keeps us from this page
    ├── TooLargeError         the body, or the number of redirects or listed pages, is past its limit
    └── TemporaryError        worth another try later: a time-out, a status of 429 or 5xx, a broken connection
"""

import socket
import ssl
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Self
from urllib.parse import urldefrag, urljoin, urlsplit, urlunsplit

import httpx
from protego import Protego
from sqlalchemy import Engine

from byrd.errors import pause_of
from tasks import store
from tasks.settings import ROBOTS_AGENT, Network, Settings

_REDIRECTS = {301, 302, 303, 307, 308}
_PAGE_STATUSES = {200, 304, 404, 410}
_MAX_REDIRECTS = 5
_MAX_SITEMAPS = 50
_MAX_LISTED = 50_000
_MAX_ROBOTS_BYTES = 512_000
_ROBOTS_AGE = 3600.0
_MAX_SLOT_WAIT = 60.0
_SLOTS_TO_MISS = 5
_RETRY_AFTER = 30.0
_MAX_RETRY_AFTER = 3600.0


class FetchError(Exception):
    """A page could not be read; the message says which and why."""


class AddressRefusedError(FetchError):
    """The address is not public, or not one that a page can have."""


class DisallowedError(FetchError):
    """robots.txt keeps us from this page."""


class TooLargeError(FetchError):
    """The answer is past its limit."""


class TemporaryError(FetchError):
    """Worth another try later."""


@dataclass(frozen=True)
class Answer:
    """What a page said: 200 with a body, 304 for unchanged, 404 or 410 for gone."""

    url: str
    """Where the redirects, if any, led."""
    status: int
    body: bytes = field(repr=False)
    content_type: str
    charset: str | None
    etag: str | None
    last_modified: str | None

    @property
    def is_html(self) -> bool:
        return self.content_type in {"text/html", "application/xhtml+xml", ""}

    @property
    def markup(self) -> str | bytes:
        """Decoded if the server named the encoding; else bytes, for the parser to find out."""
        if self.charset is None:
            return self.body
        try:
            return self.body.decode(self.charset, "replace")
        except LookupError:
            return self.body


class Fetcher:
    """Reads pages; safe to share between threads, not between processes. A context manager."""

    def __init__(self, database: Engine, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._robots: dict[str, tuple[float, Protego]] = {}
        self._client = httpx.Client(
            transport=_CheckedTransport(settings.allowed_networks),
            headers={"User-Agent": settings.user_agent, "Accept-Encoding": "gzip, deflate"},
            timeout=httpx.Timeout(settings.timeout),
            follow_redirects=False,
            trust_env=False,  # a proxy would resolve names anew, behind the back of the address check
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def get(self, url: str, *, etag: str | None = None, last_modified: str | None = None) -> Answer:
        """Read a page, or learn that it is as it was when it had this entity tag and date."""
        conditions = {"If-None-Match": etag} if etag else {"If-Modified-Since": last_modified} if last_modified else {}
        answer = self._follow(url, conditions, limit=self._settings.max_bytes)
        if answer.status not in _PAGE_STATUSES:
            raise FetchError(f"{answer.url} answered {answer.status}, which is not a page.")
        return answer

    def is_allowed(self, url: str) -> bool:
        """Whether robots.txt lets us read this page."""
        return bool(self._robots_of(_origin(url)).can_fetch(url, ROBOTS_AGENT))

    def listed_pages(self, base_url: str) -> list[str]:
        """The pages at and below an address that the site's sitemaps list, robots.txt not yet applied."""
        origin = _origin(base_url)
        folder = urlsplit(base_url).path.rstrip("/") + "/"
        named = [urljoin(origin, url) for url in self._robots_of(origin).sitemaps]
        waiting = [url for url in named if _origin(url) == origin] or [f"{origin}/sitemap.xml"]
        found: dict[str, None] = {}
        read: set[str] = set()
        while waiting:
            sitemap = waiting.pop()
            if sitemap in read:
                continue
            if len(read) >= _MAX_SITEMAPS:
                raise TooLargeError(f"{origin} has more than {_MAX_SITEMAPS} sitemaps; register a part of the site.")
            read.add(sitemap)
            nested, listed = self._read_sitemap(sitemap)
            waiting.extend(url for url in nested if _is_at(url, origin))
            found |= dict.fromkeys(urldefrag(url).url for url in listed if _is_at(url, origin, folder))
            if len(found) > _MAX_LISTED:
                raise TooLargeError(f"{origin} lists more than {_MAX_LISTED} pages; register a part of the site.")
        return sorted(found)

    def _read_sitemap(self, url: str) -> tuple[list[str], list[str]]:
        answer = self._follow(url, {}, limit=self._settings.max_bytes)
        if answer.status != 200:
            raise FetchError(f"{url} answered {answer.status}: the site has no sitemap, so its pages are unknown.")
        try:
            return _parse_sitemap(answer.body)
        except ET.ParseError as error:
            raise FetchError(f"{url} is not a sitemap: {error}.") from None

    def _follow(self, url: str, headers: dict[str, str], *, limit: int, obey_robots: bool = True) -> Answer:
        for _ in range(_MAX_REDIRECTS + 1):
            origin = _origin(url)
            delay = self._settings.min_interval
            if obey_robots:
                robots = self._robots_of(origin)
                if not robots.can_fetch(url, ROBOTS_AGENT):
                    raise DisallowedError(f"{url} is disallowed by {origin}/robots.txt.")
                delay = max(delay, float(robots.crawl_delay(ROBOTS_AGENT) or 0))
            self._wait_for_slot(origin, delay)
            deadline = time.monotonic() + self._settings.timeout
            answer, location = self._request(url, headers, limit=limit, deadline=deadline)
            if location is None:
                return answer
            url = urldefrag(urljoin(url, location)).url
        raise TooLargeError(f"{url} is the end of more than {_MAX_REDIRECTS} redirects.")

    def _request(self, url: str, headers: dict[str, str], *, limit: int, deadline: float) -> tuple[Answer, str | None]:
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                status = response.status_code
                if status == 429 or status >= 500:
                    self._back_off(url, response)
                location = response.headers.get("location") if status in _REDIRECTS else None
                body = b"" if location else _read_body(response, limit=limit, deadline=deadline)
                content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                tags = response.headers.get("etag"), response.headers.get("last-modified")
                return Answer(url, status, body, content_type, response.charset_encoding, *tags), location
        except httpx.TimeoutException:
            raise TemporaryError(f"{url} did not answer within {self._settings.timeout:g} s.") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise TemporaryError(f"{url} could not be read: {error}") from error
        except httpx.InvalidURL as error:
            raise AddressRefusedError(f"{url!r} is not an address: {error}") from None

    def _back_off(self, url: str, response: httpx.Response) -> None:
        pause = pause_of(response.headers.get("retry-after"))
        if pause is not None or response.status_code == 429:
            seconds = min(_RETRY_AFTER if pause is None else pause, _MAX_RETRY_AFTER)
            with self._database.begin() as connection:
                store.hold_host(connection, _origin(url), seconds=seconds)
        raise TemporaryError(f"{url} answered {response.status_code}.")

    def _wait_for_slot(self, origin: str, interval: float) -> None:
        """Book a moment, and wait for it.

        Who wakes up late, for the process or the machine was held up, books another, or it would come together with
        those who have the slots after it; but after a few of these it goes, for what is slow has to get on, too.
        """
        for _ in range(_SLOTS_TO_MISS + 1):
            with self._database.begin() as connection:
                asked_at = time.monotonic()
                wait = store.reserve_slot(connection, origin, interval=interval, max_wait=_MAX_SLOT_WAIT)
            if wait is None:
                raise TemporaryError(f"{origin} asked for a pause of more than {_MAX_SLOT_WAIT:g} s.")
            time.sleep(wait)
            if time.monotonic() - asked_at - wait <= interval / 2 or not interval:
                return

    def _robots_of(self, origin: str) -> Protego:
        read_at, robots = self._robots.get(origin, (0.0, None))
        if robots is None or time.monotonic() - read_at > _ROBOTS_AGE:
            with self._database.begin() as connection:
                text = store.read_robots(connection, origin, max_age=_ROBOTS_AGE)
            if text is None:
                text = self._fetch_robots(origin)
                with self._database.begin() as connection:
                    store.save_robots(connection, origin, text)
            robots = Protego.parse(text)
            self._robots[origin] = time.monotonic(), robots
        return robots

    def _fetch_robots(self, origin: str) -> str:
        """RFC 9309: a 4xx means that all is allowed; a 5xx, that nothing is for now (`_request` raises)."""
        answer = self._follow(f"{origin}/robots.txt", {}, limit=_MAX_ROBOTS_BYTES, obey_robots=False)
        if answer.status == 200:
            return answer.body.decode("utf-8", "replace").replace("\0", "")
        return ""


# ------------------------------------------------------------------------------------------------- addresses


class _CheckedTransport(httpx.BaseTransport):
    """Resolves a name, checks the addresses, and connects to a checked one.

    The URL's host becomes that address, while the Host header and TLS keep the name. Each name has a pool of its own,
    for a connection that was verified for one name must not serve another that has the same address.
    """

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._tls: ssl.SSLContext = httpx.create_ssl_context()
        self._pools: dict[str, httpx.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        pool = self._pool(host)
        addresses = self._check(host, request.url.port or (443 if request.url.scheme == "https" else 80))
        extensions = {**request.extensions, "sni_hostname": host}
        for index, address in enumerate(addresses):
            url = request.url.copy_with(host=address)
            pinned = httpx.Request(request.method, url, headers=request.headers.raw, extensions=extensions)
            try:
                return pool.handle_request(pinned)
            except httpx.ConnectError:
                if index == len(addresses) - 1:
                    raise
        raise AddressRefusedError(f"{host} has no address.")

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _pool(self, host: str) -> httpx.HTTPTransport:
        with self._lock:
            if host not in self._pools:
                self._pools[host] = httpx.HTTPTransport(verify=self._tls)
            return self._pools[host]

    def _check(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{host} cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        usable = [address for address in addresses if _may_connect(address, self._allowed)]
        if not usable:
            raise AddressRefusedError(
                f"{host} is at {', '.join(addresses)}, which is not public. "
                "If you mean to read it, name its network in MONITOR_ALLOWED_NETWORKS."
            )
        return usable


_NAT64 = IPv6Network("64:ff9b::/96")


def _may_connect(text: str, allowed: Iterable[Network]) -> bool:
    address = _unwrapped(ip_address(text.partition("%")[0]))
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside an IPv6 one, where there is one: ::ffff:127.0.0.1 is loopback too."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def check_address(url: str) -> None:
    """Raises AddressRefusedError for what cannot be a site's address."""
    _origin(url)


def _origin(url: str) -> str:
    """Scheme, host and port: what a robots.txt and a slot belong to."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressRefusedError(f"{url!r} is not an address: {error}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise AddressRefusedError(f"{url!r} is not an http or https address.")
    if parts.username is not None or parts.password is not None:
        raise AddressRefusedError(f"The address of {parts.hostname} holds a user name or a password.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = 443 if parts.scheme == "https" else 80
    return urlunsplit((parts.scheme, host if port in {None, default} else f"{host}:{port}", "", "", ""))


def _is_at(url: str, origin: str, folder: str = "/") -> bool:
    try:
        return _origin(url) == origin and f"{urlsplit(url).path}/".startswith(folder)
    except AddressRefusedError:
        return False


# ------------------------------------------------------------------------------------------------- bodies


def _read_body(response: httpx.Response, *, limit: int, deadline: float) -> bytes:
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"{response.request.url} is larger than {limit:,} bytes.")
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("too slow", request=response.request)
        chunks.append(chunk)
    return b"".join(chunks)


def _parse_sitemap(body: bytes) -> tuple[list[str], list[str]]:
    """Nested sitemaps, and pages."""
    root = ET.fromstring(body)  # noqa: S314 - expat bounds entity expansion, and the size is bounded before
    kind = root.tag.rpartition("}")[2]
    locations = list(_locations(root))
    return (locations, []) if kind == "sitemapindex" else ([], locations)


def _locations(root: ET.Element) -> Iterator[str]:
    for entry in root:
        for child in entry:
            if child.tag.rpartition("}")[2] == "loc" and child.text:
                yield child.text.strip()
