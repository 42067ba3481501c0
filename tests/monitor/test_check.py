"""A check of the rival's site, without a worker: what is captured, what is found, what is recorded."""

from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from tasks import check, store
from tasks.fetch import Fetcher, TemporaryError
from tasks.report import Report
from tasks.rival import RivalServer, expected_changes
from tasks.schema import captures, changes, contents, create_tables
from tests.monitor.web import LOOPBACK, Scripted


@pytest.fixture
def fetcher(database: Engine) -> Iterator[Fetcher]:
    with Fetcher(database, LOOPBACK) as fetcher:
        yield fetcher


def register(database: Engine, url: str) -> int:
    with database.begin() as connection:
        return store.register_competitor(connection, name="Corvane", base_url=url)


def look(database: Engine, fetcher: Fetcher, competitor: int, *, run_id: UUID | None = None) -> Report:
    """A whole check, in one batch."""
    run_id = run_id or uuid4()
    check.discover(database, fetcher, run_id, competitor)
    items = [item for _, item in check.pages_to_capture(database, run_id, None)]
    found = [check.capture(database, fetcher, item) for item in items]
    with database.begin() as connection:
        check.save(run_id, connection, found)
        return check.conclude(connection, run_id)


def found_changes(database: Engine, report: Report) -> dict[str, str]:
    with database.connect() as connection:
        rows = store.list_changes(connection, UUID(report.summary["run_id"]))
    return {"/" + row.url.split("/", 3)[3]: row.kind for row in rows}


def test_two_looks_find_just_what_changed(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    competitor = register(database, rival.url)
    first = look(database, fetcher, competitor)
    assert first.summary["first"]
    assert first.summary["pages"] == {"captured": 65, "unchanged": 65, "failed": 0, "disallowed": 2}
    assert found_changes(database, first) == {}

    rival.version = 2
    second = look(database, fetcher, competitor)
    assert found_changes(database, second) == {path: str(kind) for path, kind in expected_changes().items()}
    assert second.summary["changes"] == {"price": 5, "edited": 10, "added": 5, "removed": 4}
    assert {"page": "/pricing", "label": "Team", "old": "$49", "new": "$59"} in second.summary["prices"]
    assert rival.traffic.statuses[304] == 30

    third = look(database, fetcher, competitor)
    assert found_changes(database, third) == {}
    assert third.summary["pages"]["unchanged"] == 66

    rival.version = 1
    fourth = look(database, fetcher, competitor)
    assert fourth.summary["changes"] == {"price": 5, "edited": 10, "added": 4, "removed": 5}


def test_a_page_is_recorded_once_per_run(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    competitor, run_id = register(database, rival.url), uuid4()
    check.discover(database, fetcher, run_id, competitor)
    cursor, item = next(check.pages_to_capture(database, run_id, None))
    captured = check.capture(database, fetcher, item)
    with database.begin() as connection:
        check.save(run_id, connection, [captured])
    with pytest.raises(IntegrityError), database.begin() as connection:
        check.save(run_id, connection, [captured])
    after = [page for page, _ in check.pages_to_capture(database, run_id, cursor)]
    assert len(after) == 64
    assert min(after) > cursor


def test_steps_may_be_repeated_without_another_effect(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    competitor = register(database, rival.url)
    look(database, fetcher, competitor)
    rival.version = 2
    run_id = uuid4()
    listed = check.discover(database, fetcher, run_id, competitor)
    assert check.discover(database, fetcher, run_id, competitor) == listed == 66
    items = [item for _, item in check.pages_to_capture(database, run_id, None)]
    with database.begin() as connection:
        check.save(run_id, connection, [check.capture(database, fetcher, item) for item in items])
    with database.begin() as connection:
        report = check.conclude(connection, run_id)
    with database.begin() as connection:
        assert check.conclude(connection, run_id) == report
        assert connection.scalar(select(func.count()).select_from(changes)) == 24


def test_the_same_text_is_stored_once(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    competitor = register(database, rival.url)
    for _ in range(2):
        look(database, fetcher, competitor)
    with database.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(captures)) == 130
        assert connection.scalar(select(func.count()).select_from(contents)) == 65


def sitemap(web: Scripted, *paths: str) -> None:
    entries = "".join(f"<url><loc>{web.url}{path}</loc></url>" for path in paths)
    web.answers["/sitemap.xml"] = (200, {}, f"<urlset>{entries}</urlset>".encode())


def html(text: str) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "text/html"}, f"<html><body><h1>{text}</h1><p>{text}</p></body></html>".encode()


def test_pages_that_go_and_come_back(database: Engine, fetcher: Fetcher, web: Scripted) -> None:
    sitemap(web, "/a", "/b")
    web.answers |= {"/a": html("Alpha"), "/b": html("Beta")}
    competitor = register(database, web.url)
    look(database, fetcher, competitor)
    web.answers["/a"] = (410, {}, b"")
    assert found_changes(database, look(database, fetcher, competitor)) == {"/a": "removed"}
    assert found_changes(database, look(database, fetcher, competitor)) == {}  # still gone is no news
    sitemap(web, "/b")
    assert found_changes(database, look(database, fetcher, competitor)) == {}
    sitemap(web, "/a", "/b")
    web.answers["/a"] = html("Alpha")
    assert found_changes(database, look(database, fetcher, competitor)) == {"/a": "added"}


def test_a_page_that_cannot_be_read_does_not_look_changed(database: Engine, fetcher: Fetcher, web: Scripted) -> None:
    sitemap(web, "/a", "/b")
    web.answers |= {"/a": html("Alpha"), "/b": html("Beta")}
    competitor = register(database, web.url)
    look(database, fetcher, competitor)
    web.answers["/a"] = (403, {}, b"")
    report = look(database, fetcher, competitor)
    assert report.summary["pages"] == {"captured": 1, "unchanged": 1, "failed": 1, "disallowed": 0}
    assert "answered 403" in report.html
    web.answers["/a"] = html("Alpha, and more")
    assert found_changes(database, look(database, fetcher, competitor)) == {"/a": "edited"}


def test_a_page_that_goes_after_it_could_not_be_read_is_missed(
    database: Engine, fetcher: Fetcher, web: Scripted
) -> None:
    sitemap(web, "/a", "/b")
    web.answers |= {"/a": html("Alpha"), "/b": html("Beta")}
    competitor = register(database, web.url)
    look(database, fetcher, competitor)
    web.answers["/a"] = (403, {}, b"")
    look(database, fetcher, competitor)
    sitemap(web, "/b")
    assert found_changes(database, look(database, fetcher, competitor)) == {"/a": "removed"}


def test_a_page_that_is_down_is_worth_another_try(database: Engine, fetcher: Fetcher, web: Scripted) -> None:
    sitemap(web, "/a")
    web.answers["/a"] = (502, {}, b"")
    run_id = uuid4()
    check.discover(database, fetcher, run_id, register(database, web.url))
    [(_, item)] = check.pages_to_capture(database, run_id, None)
    with pytest.raises(TemporaryError, match="502"):
        check.capture(database, fetcher, item)
    with database.begin() as connection:
        report = check.conclude(connection, run_id)
    assert report.summary["pages"]["failed"] == 1


def test_files_are_watched_too(database: Engine, fetcher: Fetcher, web: Scripted) -> None:
    sitemap(web, "/price-list.pdf")
    web.answers["/price-list.pdf"] = (200, {"Content-Type": "application/pdf"}, b"%PDF 1")
    competitor = register(database, web.url)
    look(database, fetcher, competitor)
    web.answers["/price-list.pdf"] = (200, {"Content-Type": "application/pdf"}, b"%PDF 2")
    assert found_changes(database, look(database, fetcher, competitor)) == {"/price-list.pdf": "edited"}


def test_a_part_of_a_site_can_be_watched(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    report = look(database, fetcher, register(database, f"{rival.url}/pricing/"))
    assert report.summary["pages"]["captured"] == 5


def test_checks_of_two_competitors_are_apart(database: Engine, fetcher: Fetcher, rival: RivalServer) -> None:
    with RivalServer(version=2) as other:
        one, two = register(database, rival.url), register(database, other.url)
        look(database, fetcher, one)
        assert look(database, fetcher, two).summary["first"]
        assert found_changes(database, look(database, fetcher, one)) == {}


def test_registering_again_keeps_the_id(database: Engine) -> None:
    first = register(database, "http://a.example")
    assert register(database, "http://a.example/") == first
    with pytest.raises(store.UnknownCompetitorError, match="999"), database.connect() as connection:
        store.get_competitor(connection, 999)


def test_tables_can_be_created_again(database: Engine) -> None:
    with database.begin() as connection:
        create_tables(connection)
