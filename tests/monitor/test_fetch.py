"""Reading other people's sites: politely, and without being led astray."""

import gzip
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest
from sqlalchemy import Engine, text

from tasks import store
from tasks.fetch import (
    AddressRefusedError,
    DisallowedError,
    Fetcher,
    FetchError,
    TemporaryError,
    TooLargeError,
    _may_connect,
)
from tasks.rival import RivalServer
from tasks.rival.content import HIDDEN_PAGES
from tasks.settings import Settings
from tests.cluster import ROOT, wait_until
from tests.monitor.web import LOOPBACK, Scripted


@pytest.fixture
def fetcher(database: Engine) -> Iterator[Fetcher]:
    with Fetcher(database, LOOPBACK) as fetcher:
        yield fetcher


def test_a_page_and_then_only_what_is_new(fetcher: Fetcher, rival: RivalServer) -> None:
    url = f"{rival.url}/pricing"
    first = fetcher.get(url)
    assert (first.status, first.is_html, first.body) == (200, True, rival.site.pages["/pricing"].html)
    again = fetcher.get(url, etag=first.etag, last_modified=first.last_modified)
    assert (again.status, again.body) == (304, b"")
    by_date = fetcher.get(url, last_modified=first.last_modified)
    assert by_date.status == 304
    rival.version = 2
    assert fetcher.get(url, etag=first.etag).status == 200
    assert fetcher.get(f"{rival.url}/blog/dark-mode").status == 404


def test_listed_pages_come_from_the_sitemap_that_robots_names(fetcher: Fetcher, rival: RivalServer) -> None:
    listed = fetcher.listed_pages(rival.url)
    assert listed == sorted(f"{rival.url}{path}" for path in rival.site.pages)
    allowed = [url.removeprefix(rival.url) for url in listed if fetcher.is_allowed(url)]
    assert sorted(allowed) == rival.site.public_paths


def test_a_disallowed_page_is_never_asked_for(fetcher: Fetcher, rival: RivalServer) -> None:
    for path in HIDDEN_PAGES:
        with pytest.raises(DisallowedError, match=path):
            fetcher.get(rival.url + path)
        assert path not in rival.traffic.requests


def test_robots_is_read_once_for_all_workers(database: Engine, rival: RivalServer) -> None:
    for _ in range(3):
        with Fetcher(database, LOOPBACK) as worker:
            worker.get(f"{rival.url}/")
    assert rival.traffic.requests["/robots.txt"] == 1
    with database.begin() as connection:
        connection.execute(text("UPDATE monitor.hosts SET robots_read_at = robots_read_at - interval '2 hours'"))
    with Fetcher(database, LOOPBACK) as worker:
        worker.get(f"{rival.url}/")
    assert rival.traffic.requests["/robots.txt"] == 2


def test_requests_of_all_workers_keep_their_distance(database: Engine, rival: RivalServer) -> None:
    settings = replace(LOOPBACK, min_interval=0.1)
    paths = rival.site.public_paths[:8]
    with ThreadPoolExecutor(8) as threads:
        workers = [Fetcher(database, settings) for _ in range(4)]
        list(threads.map(lambda number: workers[number % 4].get(rival.url + paths[number]), range(8)))
        for worker in workers:
            worker.__exit__()
    traffic = rival.traffic
    assert sum(traffic.requests[path] for path in paths) == 8
    assert traffic.shortest_gap > 0.05  # 0.1 as booked; threads wake up late, and arrive late


_READER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from tasks.fetch import Fetcher
from tasks.store import open_database
from tests.monitor.web import LOOPBACK

settings = replace(LOOPBACK, min_interval=0.4)
with open_database(sys.argv[1]) as database, Fetcher(database, settings) as reader, ThreadPoolExecutor(4) as threads:
    list(threads.map(reader.get, sys.argv[2:]))
"""


def test_a_process_that_was_frozen_does_not_make_up_for_its_slots(
    database: Engine, database_url: str, rival: RivalServer
) -> None:
    urls = [rival.url + path for path in rival.site.public_paths[:8]]
    reader = subprocess.Popen([sys.executable, "-c", _READER, database_url, *urls], cwd=ROOT)
    try:
        wait_until(lambda: sum(rival.traffic.requests.values()) >= 4)  # robots.txt is one of them
        reader.send_signal(signal.SIGSTOP)
        time.sleep(1.3)  # three of its threads have slots, 0.4, 0.8 and 1.2 s later
        reader.send_signal(signal.SIGCONT)
        assert reader.wait(timeout=30) == 0
    finally:
        reader.kill()
        reader.wait()
    traffic = rival.traffic
    assert sum(traffic.requests[path] for path in rival.site.public_paths[:8]) == 8
    assert traffic.shortest_gap > 0.03  # else three of them would come at once


def test_a_longer_crawl_delay_wins(database: Engine) -> None:
    with RivalServer(crawl_delay=0.3) as slow, Fetcher(database, LOOPBACK) as fetcher:
        for path in ("/", "/pricing", "/about"):
            fetcher.get(slow.url + path)
        assert slow.traffic.shortest_gap > 0.2


def test_slots_are_booked_one_after_another(database: Engine) -> None:
    def book(_: int) -> float:
        with database.begin() as connection:
            wait = store.reserve_slot(connection, "http://a", interval=5.0, max_wait=1000)
            assert wait is not None
            return wait

    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        waits = sorted(threads.map(book, range(16)))
    took = time.monotonic() - started
    assert waits[0] == 0
    for earlier, later in pairwise(waits):
        assert 5.0 - took <= later - earlier <= 5.0 + took


def test_a_slot_that_is_too_far_off_is_not_booked(database: Engine) -> None:
    with database.begin() as connection:
        store.hold_host(connection, "http://a", seconds=100)
        assert store.reserve_slot(connection, "http://a", interval=1, max_wait=60) is None
        wait = store.reserve_slot(connection, "http://a", interval=1, max_wait=200)
        assert wait is not None
        assert 99 < wait <= 100


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_host_that_asks_for_a_pause_gets_it(
    database: Engine, fetcher: Fetcher, web: Scripted, status: int, form: str
) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=500), usegmt=True)
    web.answers["/busy"] = (status, {"Retry-After": "500" if form == "seconds" else later}, b"")
    with pytest.raises(TemporaryError, match=str(status)):
        fetcher.get(f"{web.url}/busy")
    asked = len(web.requests)
    with pytest.raises(TemporaryError, match="pause"):
        fetcher.get(f"{web.url}/other")
    assert len(web.requests) == asked
    with database.begin() as connection:
        wait = store.reserve_slot(connection, web.url, interval=1, max_wait=1000)
        assert wait is not None
        assert 480 < wait <= 500


def test_robots_that_cannot_be_read_forbid_everything_for_now(fetcher: Fetcher, web: Scripted) -> None:
    web.answers = {"/robots.txt": (500, {}, b""), "/page": (200, {}, b"hello")}
    with pytest.raises(TemporaryError, match="500"):
        fetcher.get(f"{web.url}/page")
    assert [request.path for request in web.requests] == ["/robots.txt"]


def test_a_site_without_robots_may_be_read(fetcher: Fetcher, web: Scripted) -> None:
    web.answers["/page"] = (200, {"Content-Type": "text/html; charset=iso-8859-1"}, "café".encode("latin-1"))
    assert fetcher.get(f"{web.url}/page").markup == "café"


def test_who_we_are_is_said(database: Engine, web: Scripted) -> None:
    web.answers["/page"] = (200, {}, b"")
    with Fetcher(database, replace(LOOPBACK, contact="monitor@example.com")) as fetcher:
        fetcher.get(f"{web.url}/page")
    assert {request.headers["User-Agent"] for request in web.requests} == {"ByrdMonitor/0.1 (+monitor@example.com)"}


def test_redirects_are_followed_with_every_check(fetcher: Fetcher, web: Scripted) -> None:
    web.answers = {
        "/robots.txt": (200, {}, b"User-agent: *\nDisallow: /secret"),
        "/old": (301, {"Location": "/new#part"}, b""),
        "/new": (200, {"Content-Type": "text/html"}, b"here"),
        "/trap": (302, {"Location": "/secret"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/away": (302, {"Location": "file:///etc/passwd"}, b""),
        "/inside": (302, {"Location": "http://10.1.2.3/"}, b""),
    }
    answer = fetcher.get(f"{web.url}/old")
    assert (answer.url, answer.body) == (f"{web.url}/new", b"here")
    with pytest.raises(DisallowedError):
        fetcher.get(f"{web.url}/trap")
    with pytest.raises(TooLargeError, match="redirects"):
        fetcher.get(f"{web.url}/loop")
    with pytest.raises(AddressRefusedError, match="http"):
        fetcher.get(f"{web.url}/away")
    with pytest.raises(AddressRefusedError, match=r"10\.1\.2\.3"):
        fetcher.get(f"{web.url}/inside")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"]
)
def test_addresses_that_are_not_public_are_refused(database: Engine, host: str) -> None:
    with Fetcher(database, Settings()) as fetcher, pytest.raises(AddressRefusedError, match="MONITOR_ALLOWED_NETWORKS"):
        fetcher.get(f"http://{host}:9/")


def test_the_address_that_was_checked_is_the_one_that_is_used(
    database: Engine, web: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is looked at and private when it is used (DNS rebinding) gets nowhere."""
    port = int(web.url.rpartition(":")[2])
    asked: list[str] = []

    def resolve(host: str, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    web.answers["/robots.txt"] = (200, {}, b"")
    monkeypatch.setattr(socket, "getaddrinfo", _only_for("rebound.example", resolve))
    with Fetcher(database, LOOPBACK) as fetcher:
        assert fetcher.is_allowed(f"http://rebound.example:{port}/")
    assert asked == ["rebound.example"]
    assert web.requests[0].headers["Host"] == f"rebound.example:{port}"


def _only_for(name: str, resolve: object) -> object:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: object, **kwargs: object) -> object:
        chosen = resolve if host == name else real
        return chosen(host, *args, **kwargs)  # type: ignore[operator]

    return getaddrinfo


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("172.16.5.4", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert _may_connect(address, ()) is public


@pytest.mark.parametrize("url", ["ftp://a/", "//a/", "http://", "http://u:p@a/", "http://a:99999/", "http://[::1/", ""])
def test_what_is_no_page_address_is_refused(fetcher: Fetcher, url: str) -> None:
    with pytest.raises(AddressRefusedError):
        fetcher.get(url)


def test_a_body_past_the_limit_is_left_unread(database: Engine, web: Scripted) -> None:
    web.answers["/big"] = (200, {}, b"x" * 20_000)
    web.answers["/bomb"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(b"x" * 2_000_000))
    with Fetcher(database, replace(LOOPBACK, max_bytes=10_000)) as fetcher:
        for path in ("/big", "/bomb"):
            with pytest.raises(TooLargeError, match="10,000 bytes"):
                fetcher.get(web.url + path)


def test_an_answer_that_trickles_in_is_given_up(database: Engine) -> None:
    """Each byte comes in time, and all of them never would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        enough = threading.Event()

        def trickle() -> None:
            with server.accept()[0] as robots:
                robots.recv(1000)
                robots.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            with server.accept()[0] as page:
                page.recv(1000)
                page.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while not enough.wait(0.05):
                        page.sendall(b"x")
                except OSError:
                    pass

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with (
                Fetcher(database, replace(LOOPBACK, timeout=0.5)) as fetcher,
                pytest.raises(TemporaryError, match=r"within 0\.5 s"),
            ):
                fetcher.get(f"http://127.0.0.1:{server.getsockname()[1]}/")
        finally:
            enough.set()
            thread.join()


def test_nobody_there_is_worth_another_try(fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TemporaryError, match="could not be read"):
        fetcher.get(f"http://127.0.0.1:{port}/")


def test_other_statuses_are_no_pages(fetcher: Fetcher, web: Scripted) -> None:
    web.answers["/private"] = (403, {}, b"")
    with pytest.raises(FetchError, match="403"):
        fetcher.get(f"{web.url}/private")


def test_sitemaps_may_nest_and_name_foreign_pages(fetcher: Fetcher, web: Scripted) -> None:
    def tags(outer: str, inner: str, *urls: str) -> bytes:
        entries = "".join(f"<{inner}><loc> {url} </loc></{inner}>" for url in urls)
        return f'<{outer} xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</{outer}>'.encode()

    web.answers = {
        "/sitemap.xml": (200, {}, tags("sitemapindex", "sitemap", f"{web.url}/a.xml", f"{web.url}/sitemap.xml")),
        "/a.xml": (200, {}, tags("urlset", "url", f"{web.url}/b#x", f"{web.url}/a", "http://other.example/", "no")),
    }
    assert fetcher.listed_pages(web.url) == [f"{web.url}/a", f"{web.url}/b"]


@pytest.mark.parametrize("body", [b"", b"<html>", b"\x00"])
def test_a_sitemap_that_is_none(fetcher: Fetcher, web: Scripted, body: bytes) -> None:
    web.answers["/sitemap.xml"] = (200, {}, body)
    with pytest.raises(FetchError, match="not a sitemap"):
        fetcher.listed_pages(web.url)


def test_a_site_without_a_sitemap(fetcher: Fetcher, web: Scripted) -> None:
    with pytest.raises(FetchError, match="no sitemap"):
        fetcher.listed_pages(web.url)
