"""What the demo promises, checked: the record is compared with what the rival's site knows of itself."""

import email
import email.policy
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, cast

from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from tasks import store
from tasks.dispatch import is_signed
from tasks.rival import RivalServer, Traffic, expected_changes, load_site
from tasks.rival.content import HIDDEN_PAGES
from tasks.settings import Settings


class Inbox:
    """A webhook receiver on loopback, as the owner of the monitor would run one."""

    def __init__(self, secret: str) -> None:
        self.secret = secret
        self.received: dict[str, dict[str, Any]] = {}
        """By idempotency key, so that what is delivered twice is there once."""
        self.forged = 0
        self._http = _InboxServer(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="inbox", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/hooks/monitor"

    def take(self, key: str, signature: str, body: bytes) -> int:
        if not is_signed(body, signature, self.secret, now=time.time()):
            self.forged += 1
            return 403
        self.received.setdefault(key, json.loads(body))
        return 204

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _InboxServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], inbox: Inbox) -> None:
        self.inbox = inbox
        super().__init__(address, _InboxHandler)


class _InboxHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key, signature = self.headers.get("Idempotency-Key", ""), self.headers.get("Byrd-Signature", "")
        self.send_response(cast("_InboxServer", self.server).inbox.take(key, signature, body))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""


@dataclass(frozen=True)
class Evidence:
    """What the demo saw."""

    database: Engine
    folder: Path
    rival: RivalServer
    inbox: Inbox
    first: Any
    second: Any
    first_traffic: Traffic
    second_traffic: Traffic
    crawl_delay: float
    pages_at_kill: int
    resumed_after: float
    seconds: float
    time_limit: float

    @property
    def report(self) -> Path:
        return self.folder / "reports" / f"{self.second.id}.html"


@dataclass(frozen=True)
class Verdict:
    promise: str
    good: bool
    seen: str


def check_all(evidence: Evidence) -> list[Verdict]:
    checks: list[Callable[[Evidence], Verdict]] = [
        _every_page_was_captured,
        _each_page_was_recorded_once,
        _every_change_was_found,
        _the_step_was_resumed,
        _the_site_was_treated_politely,
        _unchanged_pages_were_not_sent_again,
        _the_report_stands_alone,
        _the_webhook_was_called,
        _mail_was_written,
        _it_was_quick,
    ]
    return [_checked(check, evidence) for check in checks]


def summarise(console: Console, evidence: Evidence, verdicts: list[Verdict]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for verdict in verdicts:
        sign = "[bold green]✓[/]" if verdict.good else "[bold red]✗[/]"
        table.add_row(sign, verdict.promise, f"[dim]{verdict.seen}[/]" if verdict.good else f"[red]{verdict.seen}[/]")
    console.print()
    console.print(table, highlight=False)
    missing = sum(not verdict.good for verdict in verdicts)
    if missing:
        console.print(f"\n[bold red]{missing} of {len(verdicts)} promises were not kept.[/]")
    console.print("\nThe report: ", end="")
    console.print(str(evidence.report), style="bold", soft_wrap=True, highlight=False)
    console.print()


def _checked(check: Callable[[Evidence], Verdict], evidence: Evidence) -> Verdict:
    try:
        return check(evidence)
    except (LookupError, OSError, ValueError) as error:  # what should be there is not
        promise = check.__name__.strip("_").replace("_", " ").capitalize()
        return Verdict(promise, False, f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------- promises


def _every_page_was_captured(evidence: Evidence) -> Verdict:
    first, second = _pages(evidence, evidence.first), _pages(evidence, evidence.second)
    good = sorted(first) == load_site(1).public_paths and sorted(second) == load_site(2).public_paths
    return Verdict("Every page was captured", good, f"{len(first)} pages, then {len(second)}")


def _each_page_was_recorded_once(evidence: Evidence) -> Verdict:
    listed = evidence.second.steps()[0]
    result = json.loads(listed.result)
    rows, times = _pages(evidence, evidence.second), evidence.second_traffic.requests
    again = sum(times.get(path, 0) > 1 for path in rows)
    good = max(rows.values()) == 1 and result["captured"] == result["listed"] == len(rows) and result["failed"] == 0
    return Verdict(
        "Each page was recorded once",
        good,
        f"{sum(rows.values())} records of {len(rows)} pages; {again} pages read twice",
    )


def _every_change_was_found(evidence: Evidence) -> Verdict:
    with evidence.database.connect() as connection:
        first = store.list_changes(connection, evidence.first.id)
        found = {_path(change.url): change.kind for change in store.list_changes(connection, evidence.second.id)}
    wanted = {path: str(kind) for path, kind in expected_changes().items()}
    kinds = Counter(found.values())
    words = {"price": "prices changed", "edited": "edited", "added": "added", "removed": "removed"}
    seen = ", ".join(f"{kinds[kind]} {word}" for kind, word in words.items())
    wrong = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    if wrong:
        seen += f"; wrong: {', '.join(wrong)}"
    return Verdict("Every change was found", not first and found == wanted, seen)


def _the_step_was_resumed(evidence: Evidence) -> Verdict:
    capture, *others = evidence.second.steps()
    undisturbed = [step for step in [*evidence.first.steps(), *others] if step.task]
    seen = (
        f"{capture.attempt} attempts, {capture.preemptions} preemption; next start after {evidence.resumed_after:.1f} s"
    )
    good = (capture.attempt, capture.preemptions) == (2, 1) and all(step.attempt == 1 for step in undisturbed)
    return Verdict("The killed step went on where it was", good and evidence.pages_at_kill > 0, seen)


def _the_site_was_treated_politely(evidence: Evidence) -> Verdict:
    both = (evidence.first_traffic, evidence.second_traffic)
    trespasses = sum(traffic.requests.get(path, 0) for traffic in both for path in HIDDEN_PAGES)
    busiest = max(traffic.busiest_second for traffic in both)
    # Slots are exact, and arrivals are not: each thread can have one request that was held up on its way to a second
    # in which the others keep their slots.
    peak, threads = max(traffic.peak_concurrency for traffic in both), Settings().parallelism
    slots = int(1 / evidence.crawl_delay) + 1
    good = trespasses == 0 and peak <= 2 * threads and busiest <= slots + threads
    seen = f"at most {busiest} requests a second, {peak} at a time"
    return Verdict("robots.txt and its crawl delay were honoured", good, seen)


def _unchanged_pages_were_not_sent_again(evidence: Evidence) -> Verdict:
    answers = evidence.second_traffic.statuses
    before, now = load_site(1).pages, evidence.rival.site.pages
    same = sum(path in before and before[path].etag == now[path].etag for path in evidence.rival.site.public_paths)
    return Verdict(
        "Unchanged pages were not sent again",
        answers.get(304, 0) >= same > 0,
        f"304 for {answers.get(304, 0)} of {sum(answers.values())} requests",
    )


def _the_report_stands_alone(evidence: Evidence) -> Verdict:
    html = evidence.report.read_text(encoding="utf-8")
    outside = re.findall(r"<(?:script|img|link|iframe|object)\b|@import|url\(", html)
    words = all(word in html for word in ("$59", "Introducing Autopilot", "Why dark mode took us two years"))
    return Verdict("The report is one self-contained file", words and not outside, f"{len(html) / 1000:.0f} kB of HTML")


def _the_webhook_was_called(evidence: Evidence) -> Verdict:
    inbox = evidence.inbox
    keys = {f"monitor-{run.id}" for run in (evidence.first, evidence.second)}
    payload = inbox.received[f"monitor-{evidence.second.id}"]
    wanted = Counter(str(kind) for kind in expected_changes().values())
    good = inbox.received.keys() == keys and inbox.forged == 0 and payload["changes"] == wanted
    return Verdict("The webhook was called, signed", good, f"{len(inbox.received)} deliveries")


def _mail_was_written(evidence: Evidence) -> Verdict:
    files = sorted((evidence.folder / "mail").glob("*.eml"))
    for run in (evidence.first, evidence.second):
        path = evidence.folder / "mail" / f"monitor-{run.id}.eml"
        message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        [attachment] = message.iter_attachments()
        report = (evidence.folder / "reports" / f"{run.id}.html").read_text(encoding="utf-8")
        if attachment.get_content().strip() != report.strip():
            return Verdict("Mail was written", False, f"{path} does not hold the report")
    return Verdict("Mail was written, with the report", len(files) == 2, f"{len(files)} .eml files")


def _it_was_quick(evidence: Evidence) -> Verdict:
    good = evidence.seconds < evidence.time_limit
    return Verdict(f"It took less than {evidence.time_limit:g} s", good, f"{evidence.seconds:.0f} s")


def _pages(evidence: Evidence, run: Any) -> Counter[str]:
    """How many records a run has of each page."""
    statement = text(
        "SELECT p.url FROM monitor.captures k JOIN monitor.pages p ON p.id = k.page_id "
        "WHERE k.run_id = :run AND k.content_sha256 IS NOT NULL"
    )
    with evidence.database.connect() as connection:
        return Counter(_path(url) for url in connection.scalars(statement, {"run": run.id}))


def _path(url: str) -> str:
    return "/" + url.partition("://")[2].partition("/")[2]
