"""The admin as a person uses it, in a real browser, with a beat at work behind it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from tests.beat.conftest import Process, Start, rows, wait_until

USER, PASSWORD = "ada", "note-g-of-1843"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium with its chromedriver (Debian: apt install chromium chromium-driver)"
)


@pytest.fixture
def site(start: Start) -> str:
    """The address of a running admin, started as the Procfile does, with one user."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    web = start(
        "beat",
        "run",
        BYRD_WEB_BIND=address,
        DJANGO_SUPERUSER_USERNAME=USER,
        DJANGO_SUPERUSER_PASSWORD=PASSWORD,
    )
    wait_until(lambda: web.popen.poll() is not None or answers(f"http://{address}/health"), "the admin answers")
    assert web.popen.poll() is None, web.text()
    return f"http://{address}"


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, ConnectionError):
        return False


@dataclass
class Page:
    """What a person sees and does."""

    driver: Any
    site: str

    def open(self, path: str) -> None:
        self.driver.get(self.site + path)

    def follow(self, link: str) -> None:
        self._click(self.driver.find_element("link text", link))

    def fill(self, **fields: str) -> None:
        for name, value in fields.items():
            field = self.driver.find_element("name", name)
            field.clear()
            field.send_keys(value)

    def choose(self, field: str, option: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element("name", field)).select_by_visible_text(option)

    def press(self, selector: str) -> None:
        self._click(self.driver.find_element("css selector", selector))

    def act(self, action: str) -> None:
        """Select all rows of a list and do something with them."""
        self.driver.find_element("id", "action-toggle").click()
        self.choose("action", action)
        self.press("button[name=index]")

    def text(self) -> str:
        return str(self.driver.find_element("css selector", "#content, #container").text)

    def messages(self) -> str:
        return " ".join(message.text for message in self.driver.find_elements("css selector", ".messagelist li"))

    def row(self) -> dict[str, str]:
        """The only row of a list, by column."""
        cells = self.driver.find_elements("css selector", "#result_list tbody tr > *:not(.action-checkbox)")
        columns = [cell.get_attribute("class").split()[0].removeprefix("field-") for cell in cells]
        icons = [cell.find_elements("tag name", "img") for cell in cells]
        shown = [icon[0].get_attribute("alt") if icon else cell.text for cell, icon in zip(cells, icons, strict=True)]
        return dict(zip(columns, shown, strict=True))

    def _click(self, element: Any) -> None:
        """Click what leads to another page, and wait for it."""
        from selenium.webdriver.support.expected_conditions import staleness_of
        from selenium.webdriver.support.wait import WebDriverWait

        page = self.driver.find_element("tag name", "html")
        element.click()
        WebDriverWait(self.driver, 20).until(staleness_of(page))


@pytest.fixture
def page(site: str) -> Iterator[Page]:
    """A browser in which the user has logged in."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--window-size=1400,1600", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own refuses to work for root
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER)) as driver:
        found = Page(driver, site)
        found.open("/")
        found.fill(username=USER, password=PASSWORD)
        found.press("[type=submit]")
        yield found


@needs_browser
def test_a_person_adds_pauses_resumes_and_deletes_a_schedule(
    page: Page, schedules_url: str, beat: Callable[[], Process]
) -> None:
    def runs() -> int:
        return len(rows(schedules_url, "SELECT id FROM byrd.runs WHERE key LIKE 'schedule:%%'"))

    # Adding one, with mistakes at first.
    page.follow("Schedules")
    page.follow("ADD SCHEDULE")
    page.fill(name="Tick <b>often</b>", arguments="[1,", cron="61 * * * *")
    page.press("[name=_save]")
    assert "This field is required." in page.text()  # the workflow
    assert "This is not JSON: Expecting value at line 1, column 4." in page.text()
    assert "'61' is no minute. It has to be 0 to 59." in page.text()

    page.choose("workflow", "shop.tick")
    page.fill(arguments='["né"]', keyword_arguments='{"loud": true}', cron="", every="1")
    page.choose("period", "seconds")
    page.press("[name=_save]")
    assert "was added successfully" in page.messages()
    shown = page.row()
    assert (shown["name"], shown["workflow"], shown["active"]) == ("Tick <b>often</b>", "shop.tick", "True")
    assert shown["when"] == "every second"

    # It fires.
    beat()
    wait_until(lambda: runs() >= 2, "the schedule fired twice")
    assert rows(schedules_url, "SELECT DISTINCT workflow FROM byrd.runs") == ["shop.tick"]

    # Paused, it does not; resumed, it does.
    page.act("Pause selected schedules")
    assert "Paused: 1." in page.messages()
    before = runs()
    assert (page.row()["active"], page.row()["next_due"]) == ("False", "paused")
    page.act("Submit a run of selected schedules now")  # by hand it can be run nevertheless, and needs no beat
    assert "Tick <b>often</b>: run " in page.messages()
    by_hand = page.messages().split("run ")[1]
    assert rows(schedules_url, "SELECT key FROM byrd.runs WHERE id::text = %s", by_hand) == [None]
    assert runs() == before
    page.act("Resume selected schedules")
    wait_until(lambda: runs() > before, "the schedule fires again")

    # Changed, and deleted.
    page.follow("Tick <b>often</b>")
    page.fill(cron="0 4 * * mon-fri", every="", description="less often")
    page.press("[name=_save]")
    assert page.row()["when"] == "0 4 * * mon-fri UTC"
    assert page.row()["next_due"].endswith(" 04:00:00")
    page.act("Delete selected schedules")
    page.press("#content [type=submit]")
    assert "Successfully deleted 1 schedule." in page.messages()
    errors = [entry["message"] for entry in page.driver.get_log("browser") if "favicon" not in entry["message"]]
    assert errors == []


@needs_browser
def test_ordinary_periodic_tasks_keep_their_own_admin(page: Page, schedules_url: str) -> None:
    page.follow("Intervals")
    page.follow("ADD INTERVAL")
    page.fill(every="5")
    page.choose("period", "Minutes")
    page.press("[name=_save]")
    page.follow("Periodic tasks")
    page.follow("ADD PERIODIC TASK")
    page.fill(name="Ordinary")
    page.choose("regtask", "tests.beat.shop.note")
    page.choose("interval", "every 5 minutes")
    page.press("[name=_save]")
    assert "was added successfully" in page.messages()
    saved = rows(schedules_url, "SELECT name, task FROM beat.django_celery_beat_periodictask")
    assert saved == [("Ordinary", "tests.beat.shop.note")]
    page.follow("Schedules")
    assert "0 schedules" in page.text()


def test_strangers_see_the_login_page_its_styles_and_nothing_else(site: str) -> None:
    for path in ("/", "/beat/schedule/", "/nothing/here", "/static/%2e%2e/beat/settings.py"):
        status, url, _ = asked(site + path)
        assert status == 200
        assert url.startswith(f"{site}/login/?next=")
    status, _, text = asked(f"{site}/health", Host="evil.example")
    assert status == 400
    assert b"Traceback" not in text
    assert asked(f"{site}/static/admin/css/base.css")[0] == 200


def asked(url: str, **headers: str) -> tuple[int, str, bytes]:
    try:
        response = urlopen(Request(url, headers=headers), timeout=10)
    except HTTPError as refusal:
        response = refusal
    with response:
        return response.status, response.url, response.read()
