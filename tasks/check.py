"""One look at a competitor, in the parts that the executors call: discover, capture, save, conclude."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine

from tasks import store
from tasks.compare import ChangeKind, Comparison, Document, compare, describe_file, extract, whole
from tasks.fetch import Answer, Fetcher, FetchError, TemporaryError
from tasks.report import Report, build_report
from tasks.schema import create_tables

_GONE = frozenset({404, 410})


@dataclass(frozen=True)
class CapturedPage:
    """What came of one page, to be saved with its batch."""

    capture: store.Capture
    document: Document | None = None
    change: store.Change | None = None


def discover(database: Engine, fetcher: Fetcher, run_id: UUID, competitor_id: int) -> int:
    """Write down which pages this run will capture: all that are listed, but those that robots.txt keeps from us."""
    with database.begin() as connection:
        create_tables(connection)
        competitor = store.get_competitor(connection, competitor_id)
    listed = fetcher.listed_pages(competitor.base_url)
    allowed = [url for url in listed if fetcher.is_allowed(url)]
    with database.begin() as connection:
        return store.begin_check(
            connection, run_id=run_id, competitor_id=competitor_id, urls=allowed, disallowed=len(listed) - len(allowed)
        )


def pages_to_capture(database: Engine, run_id: UUID, cursor: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The pages behind the cursor, each with its own: what `CheckpointTask.iterate` asks of an enumerator."""
    for page in store.pages_after(database, run_id, cursor):
        yield page.id, asdict(page)


def capture(database: Engine, fetcher: Fetcher, item: dict[str, Any]) -> CapturedPage:
    """Read one page and compare it with the last time.

    Raises TemporaryError for what is worth another try; any other failure to read the page is what gets captured.
    """
    page = store.ListedPage(**item)
    try:
        answer = fetcher.get(page.url, etag=page.etag, last_modified=page.last_modified)
    except TemporaryError:
        raise
    except FetchError as error:
        return CapturedPage(store.Capture(page.id, error=str(error)))
    if answer.status in _GONE:
        return CapturedPage(store.Capture(page.id, status=answer.status))
    before = _load(database, page.content_sha256) if page.content_sha256 else None
    document = before if answer.status == 304 and before is not None else _read(answer)
    comparison: Comparison | None = None
    if page.is_new:
        comparison = whole(document, ChangeKind.ADDED)
    elif before is not None:
        comparison = compare(before, document)
    same = answer.status == 304  # and then a server may leave out what it said the last time
    captured = store.Capture(
        page.id,
        status=answer.status,
        etag=answer.etag or (page.etag if same else None),
        last_modified=answer.last_modified or (page.last_modified if same else None),
        content_sha256=document.sha256,
    )
    return CapturedPage(captured, document, _change(page.id, document.title, comparison) if comparison else None)


def save(run_id: UUID, connection: Connection, pages: Sequence[CapturedPage]) -> None:
    """For the transaction that saves the checkpoint: so each page is recorded once, whatever is killed."""
    store.save_captures(
        connection,
        run_id,
        documents={page.document.sha256: page.document.to_json() for page in pages if page.document},
        found=[page.capture for page in pages],
        changed=[page.change for page in pages if page.change],
    )


def conclude(connection: Connection, run_id: UUID) -> Report:
    """When all pages are captured: record which are gone, and write the report. The check is finished then."""
    removed = []
    for page_id, sha256 in store.pages_gone(connection, run_id):
        document = Document.from_json(store.load_document(connection, sha256))
        removed.append(_change(page_id, document.title, whole(document, ChangeKind.REMOVED)))
    store.record_changes(connection, run_id, removed)
    report = build_report(
        store.check_summary(connection, run_id),
        store.list_captured(connection, run_id),
        store.list_changes(connection, run_id),
    )
    store.save_report(connection, run_id, summary=report.summary, html=report.html, text=report.text)
    store.finish_check(connection, run_id)
    return report


def _read(answer: Answer) -> Document:
    return extract(answer.markup) if answer.is_html else describe_file(answer.content_type, answer.body)


def _change(page_id: int, title: str, comparison: Comparison) -> store.Change:
    detail = {"title": title, **comparison.to_json()}
    return store.Change(page_id, str(comparison.kind), comparison.similarity, detail)


def _load(database: Engine, sha256: str) -> Document:
    with database.connect() as connection:
        return Document.from_json(store.load_document(connection, sha256))
