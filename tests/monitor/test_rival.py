"""The rival's site: real enough to practise on, and the same on every machine."""

import json
import time
from email.utils import format_datetime

import httpx
import pytest

from tasks.rival import Change, RivalServer, expected_changes, load_site
from tasks.rival.content import HIDDEN_PAGES


def test_the_site_is_large_and_varied() -> None:
    paths = load_site(1).public_paths
    assert len(paths) >= 60
    for section in ("pricing", "product", "blog", "docs", "customers", "integrations"):
        assert sum(path.startswith(f"/{section}") for path in paths) >= 5


def test_the_versions_differ_where_the_list_of_changes_says() -> None:
    first, second = load_site(1).pages, load_site(2).pages
    changes = expected_changes()
    assert {path for path, kind in changes.items() if kind is Change.ADDED} == second.keys() - first.keys()
    assert {path for path, kind in changes.items() if kind is Change.REMOVED} == first.keys() - second.keys()
    for path in first.keys() & second.keys():
        if path in changes:
            assert first[path].html != second[path].html
            assert first[path].last_modified < second[path].last_modified
        elif not path.startswith("/docs"):  # a new link in the menu of all documentation pages
            assert first[path] == second[path]


def test_a_page_is_not_sent_again_to_who_has_it(rival: RivalServer) -> None:
    page = rival.site.pages["/pricing"]
    fresh = [
        {"If-None-Match": page.etag},
        {"If-None-Match": f'"other", W/{page.etag}'},
        {"If-Modified-Since": format_datetime(page.last_modified, usegmt=True)},
    ]
    stale = [{}, {"If-None-Match": '"other"'}, {"If-Modified-Since": "Mon, 01 Jan 2024 00:00:00 GMT"}]
    stale += [{"If-Modified-Since": "gibberish"}]
    stale += [{"If-None-Match": '"other"', "If-Modified-Since": format_datetime(page.last_modified, usegmt=True)}]
    with httpx.Client(base_url=rival.url) as client:
        for headers in fresh:
            assert client.get("/pricing", headers=headers).status_code == 304
        for headers in stale:
            answer = client.get("/pricing", headers=headers)
            assert answer.status_code == 200
            assert answer.content == page.html
    assert rival.traffic.requests["/pricing"] == 8
    assert rival.traffic.statuses == {200: 5, 304: 3}


def test_an_answer_is_counted_before_it_is_sent(rival: RivalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    count = rival.answered

    def count_late(status: int) -> None:
        time.sleep(0.2)
        count(status)

    monkeypatch.setattr(rival, "answered", count_late)
    for expected in (1, 2):
        httpx.get(f"{rival.url}/pricing")
        assert rival.traffic.peak_concurrency == 1
        assert rival.traffic.statuses == {200: expected}


def test_the_version_can_be_switched_while_it_serves(rival: RivalServer) -> None:
    with httpx.Client(base_url=rival.url) as client:
        assert "$49" in client.get("/pricing").text
        assert client.get("/blog/dark-mode").status_code == 200
        assert client.post("/_admin/version", json={"version": 2}).json() == {"version": 2}
        assert "$59" in client.get("/pricing").text
        assert client.get("/blog/dark-mode").status_code == 404


@pytest.mark.parametrize("body", ['{"version": 3}', '{"version": []}', "{}", "[]", "no"])
def test_a_wrong_version_is_refused(rival: RivalServer, body: str) -> None:
    answer = httpx.post(f"{rival.url}/_admin/version", content=body)
    assert answer.status_code == 400
    assert rival.version == 1


def test_robots_and_sitemap(rival: RivalServer) -> None:
    with RivalServer(crawl_delay=0.25) as slow:
        assert "Crawl-delay: 0.25" in httpx.get(f"{slow.url}/robots.txt").text
    assert "Crawl-delay" not in rival.robots()
    sitemap = httpx.get(f"{rival.url}/sitemap.xml").text
    assert sitemap.count("<url>") == len(rival.site.pages)
    for path in HIDDEN_PAGES:
        assert f"{rival.url}{path}</loc>" in sitemap
        assert json.dumps(path)[1:9] in rival.robots()
