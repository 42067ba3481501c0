"""Every SQL statement of the monitor. Each function joins the caller's transaction, and may be run again with the same
arguments without another effect, because a step may be."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, Text, bindparam, create_engine, func, insert, make_url, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert

from tasks.schema import captures, changes, checks, competitors, contents, listings, notifications, pages, reports


class UnknownCompetitorError(LookupError):
    """No competitor has this id."""


@dataclass(frozen=True)
class Competitor:
    id: int
    name: str
    base_url: str


@dataclass(frozen=True)
class ListedPage:
    """A page to capture, with what is known of it from the last time."""

    id: int
    url: str
    is_new: bool
    """Not listed by the check before, though there was one."""
    etag: str | None
    last_modified: str | None
    content_sha256: str | None


@dataclass(frozen=True)
class Capture:
    page_id: int
    status: int | None = None
    error: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    content_sha256: str | None = None


@dataclass(frozen=True)
class Change:
    page_id: int
    kind: str
    similarity: float
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class FoundChange:
    """A change as a report shows it."""

    url: str
    title: str
    kind: str
    similarity: float
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class CapturedPage:
    url: str
    title: str
    status: int | None
    error: str | None
    """Both None: listed, and not captured."""
    change: str | None


@dataclass(frozen=True)
class CheckSummary:
    competitor: Competitor
    run_id: UUID
    started_at: datetime
    previous_at: datetime | None
    """When the check that this one compares with was started; None for the first."""
    disallowed: int


@dataclass(frozen=True)
class SavedReport:
    summary: dict[str, Any]
    html: str
    text: str


@contextmanager
def open_database(database_url: str) -> Iterator[Engine]:
    """A pool of connections for as long as the block lasts; not to be carried over a fork."""
    url = make_url(database_url).set(drivername="postgresql+psycopg2")
    options = {"connect_timeout": 5, "application_name": "monitor", "options": "-c timezone=UTC"}
    engine = create_engine(url, pool_pre_ping=True, connect_args=options)
    try:
        yield engine
    finally:
        engine.dispose()


# ------------------------------------------------------------------------------------------------- competitors, checks


def register_competitor(connection: Connection, *, name: str, base_url: str) -> int:
    """The competitor's id; an address that is known already keeps its id and takes the new name."""
    statement = upsert(competitors).values(name=name, base_url=base_url.rstrip("/"))
    statement = statement.on_conflict_do_update(index_elements=["base_url"], set_={"name": statement.excluded.name})
    return int(connection.execute(statement.returning(competitors.c.id)).scalar_one())


def get_competitor(connection: Connection, competitor_id: int) -> Competitor:
    row = connection.execute(select(competitors).where(competitors.c.id == competitor_id)).one_or_none()
    if row is None:
        raise UnknownCompetitorError(f"There is no competitor {competitor_id}; register it first.")
    return Competitor(row.id, row.name, row.base_url)


def begin_check(
    connection: Connection, *, run_id: UUID, competitor_id: int, urls: Sequence[str], disallowed: int
) -> int:
    """Write down what this run will capture; returns how many pages."""
    finished = select(checks.c.run_id).where(checks.c.competitor_id == competitor_id, checks.c.finished_at.is_not(None))
    previous = connection.scalar(finished.order_by(checks.c.finished_at.desc()).limit(1))
    begun = upsert(checks).values(
        run_id=run_id, competitor_id=competitor_id, previous_run_id=previous, disallowed=disallowed
    )
    if connection.execute(begun.on_conflict_do_nothing().returning(checks.c.run_id)).first() is not None:
        listed = bindparam("urls", sorted(set(urls)), ARRAY(Text))
        connection.execute(
            upsert(pages)
            .from_select(["competitor_id", "url"], select(text(str(int(competitor_id))), func.unnest(listed)))
            .on_conflict_do_nothing()
        )
        known = pages.c.competitor_id == competitor_id, pages.c.url == func.any(listed)
        connection.execute(
            insert(listings).from_select(
                ["run_id", "page_id"], select(bindparam("run", run_id), pages.c.id).where(*known)
            )
        )
    count = select(func.count()).where(listings.c.run_id == run_id)
    return int(connection.scalar(count) or 0)


def finish_check(connection: Connection, run_id: UUID) -> None:
    connection.execute(
        update(checks)
        .where(checks.c.run_id == run_id, checks.c.finished_at.is_(None))
        .values(finished_at=func.clock_timestamp())
    )


# ------------------------------------------------------------------------------------------------- pages, captures

_NEXT_PAGES = text("""
    SELECT p.id, p.url,
           c.previous_run_id IS NOT NULL AND before.page_id IS NULL AS is_new,
           seen.etag, seen.last_modified, seen.content_sha256
      FROM monitor.listings l
      JOIN monitor.checks c ON c.run_id = l.run_id
      JOIN monitor.pages p ON p.id = l.page_id
      LEFT JOIN monitor.listings before ON before.run_id = c.previous_run_id AND before.page_id = p.id
      LEFT JOIN LATERAL (
           SELECT k.etag, k.last_modified, k.content_sha256
             FROM monitor.captures k
            WHERE k.page_id = p.id AND k.run_id <> l.run_id AND k.content_sha256 IS NOT NULL
            ORDER BY k.captured_at DESC LIMIT 1) seen ON true
     WHERE l.run_id = :run_id AND l.page_id > :after
     ORDER BY l.page_id LIMIT :limit""")


def pages_after(engine: Engine, run_id: UUID, page_id: int | None, *, chunk: int = 200) -> Iterator[ListedPage]:
    """The pages of a check in a fixed order, those behind `page_id` only; holds no connection between chunks."""
    after = page_id or 0
    while True:
        with engine.connect() as connection:
            rows = connection.execute(_NEXT_PAGES, {"run_id": run_id, "after": after, "limit": chunk}).all()
        for row in rows:
            yield ListedPage(row.id, row.url, row.is_new, row.etag, row.last_modified, row.content_sha256)
        if len(rows) < chunk:
            return
        after = rows[-1].id


def load_document(connection: Connection, sha256: str) -> dict[str, Any]:
    document: dict[str, Any] = connection.execute(
        select(contents.c.document).where(contents.c.sha256 == sha256)
    ).scalar_one()
    return document


def save_captures(
    connection: Connection,
    run_id: UUID,
    *,
    documents: Mapping[str, Mapping[str, Any]],
    found: Iterable[Capture],
    changed: Iterable[Change],
) -> None:
    """One batch. A page that this run has recorded already raises IntegrityError: it would mean that a batch was
    committed twice, which the checkpoint is there to prevent."""
    if documents:
        # In one order everywhere, so that two runs which meet the same new contents cannot deadlock.
        rows = [{"sha256": sha, "document": document} for sha, document in sorted(documents.items())]
        connection.execute(upsert(contents).on_conflict_do_nothing(), rows)
    captured = [{"run_id": run_id, **vars(capture)} for capture in found]
    if captured:
        connection.execute(insert(captures), captured)
    record_changes(connection, run_id, changed)


def record_changes(connection: Connection, run_id: UUID, changed: Iterable[Change]) -> None:
    rows = [{"run_id": run_id, **vars(change)} for change in changed]
    if rows:
        connection.execute(upsert(changes).on_conflict_do_nothing(), rows)


_GONE = text("""
    SELECT p.id, seen.content_sha256
      FROM monitor.checks c
      JOIN monitor.listings before ON before.run_id = c.previous_run_id
      JOIN monitor.pages p ON p.id = before.page_id
      JOIN LATERAL (
           SELECT k.content_sha256, k.status
             FROM monitor.captures k
            WHERE k.page_id = p.id AND k.run_id <> c.run_id AND k.status IS NOT NULL
            ORDER BY k.captured_at DESC LIMIT 1) seen ON seen.content_sha256 IS NOT NULL
      LEFT JOIN monitor.listings l ON l.run_id = c.run_id AND l.page_id = p.id
      LEFT JOIN monitor.captures now ON now.run_id = c.run_id AND now.page_id = p.id
     WHERE c.run_id = :run_id AND (l.page_id IS NULL OR now.status IN (404, 410))
     ORDER BY p.url""")


def pages_gone(connection: Connection, run_id: UUID) -> list[tuple[int, str]]:
    """Pages that the check before had and this one has not: id, and the content they had."""
    return [(row.id, row.content_sha256) for row in connection.execute(_GONE, {"run_id": run_id})]


# ------------------------------------------------------------------------------------------------- reports


def list_competitors(connection: Connection) -> list[Competitor]:
    rows = connection.execute(select(competitors).order_by(competitors.c.id))
    return [Competitor(row.id, row.name, row.base_url) for row in rows]


def check_summary(connection: Connection, run_id: UUID) -> CheckSummary:
    before = checks.alias("before")
    row = connection.execute(
        select(checks, competitors.c.name, competitors.c.base_url, before.c.started_at.label("previous_at"))
        .join(competitors, competitors.c.id == checks.c.competitor_id)
        .outerjoin(before, before.c.run_id == checks.c.previous_run_id)
        .where(checks.c.run_id == run_id)
    ).one()
    competitor = Competitor(row.competitor_id, row.name, row.base_url)
    return CheckSummary(competitor, row.run_id, row.started_at, row.previous_at, row.disallowed)


def list_changes(connection: Connection, run_id: UUID) -> list[FoundChange]:
    rows = connection.execute(
        select(pages.c.url, changes.c.kind, changes.c.similarity, changes.c.detail)
        .join(changes, changes.c.page_id == pages.c.id)
        .where(changes.c.run_id == run_id)
        .order_by(pages.c.url)
    )
    return [FoundChange(row.url, row.detail["title"], row.kind, row.similarity, row.detail) for row in rows]


def list_captured(connection: Connection, run_id: UUID) -> list[CapturedPage]:
    """Every page that the check set out to capture."""
    of_page = captures.c.page_id == listings.c.page_id, captures.c.run_id == listings.c.run_id
    to_page = changes.c.page_id == listings.c.page_id, changes.c.run_id == listings.c.run_id
    rows = connection.execute(
        select(
            pages.c.url,
            contents.c.document["title"].astext.label("title"),
            captures.c.status,
            captures.c.error,
            changes.c.kind,
        )
        .select_from(listings)
        .join(pages, pages.c.id == listings.c.page_id)
        .outerjoin(captures, of_page[0] & of_page[1])
        .outerjoin(contents, contents.c.sha256 == captures.c.content_sha256)
        .outerjoin(changes, to_page[0] & to_page[1])
        .where(listings.c.run_id == run_id)
        .order_by(pages.c.url)
    )
    return [CapturedPage(row.url, row.title or "", row.status, row.error, row.kind) for row in rows]


def save_report(connection: Connection, run_id: UUID, *, summary: Mapping[str, Any], html: str, text: str) -> None:
    values = {"summary": summary, "html": html, "text": text}
    connection.execute(
        upsert(reports).values(run_id=run_id, **values).on_conflict_do_update(index_elements=["run_id"], set_=values)
    )


def load_report(connection: Connection, run_id: UUID) -> SavedReport:
    statement = select(reports.c.summary, reports.c.html, reports.c.text).where(reports.c.run_id == run_id)
    return SavedReport(**connection.execute(statement).one()._mapping)  # noqa: SLF001 - public, by its documentation


# ------------------------------------------------------------------------------------------------- notifications


def record_notification(connection: Connection, run_id: UUID, *, channel: str, target: str) -> None:
    connection.execute(
        upsert(notifications).values(run_id=run_id, channel=channel, target=target).on_conflict_do_nothing()
    )


# ------------------------------------------------------------------------------------------------- hosts

_RESERVE_SLOT = text("""
    INSERT INTO monitor.hosts AS h (origin, next_at)
    VALUES (:origin, clock_timestamp() + make_interval(secs => :interval))
    ON CONFLICT (origin) DO UPDATE
       SET next_at = greatest(h.next_at, clock_timestamp()) + make_interval(secs => :interval)
     WHERE h.next_at <= clock_timestamp() + make_interval(secs => :max_wait)
    RETURNING greatest(0, extract(epoch FROM next_at - clock_timestamp()) - :interval)::float8 AS wait""")


def reserve_slot(connection: Connection, origin: str, *, interval: float, max_wait: float) -> float | None:
    """Book the next moment at which this host may be asked, over all workers: seconds to wait until then.

    None when that moment is more than `max_wait` seconds away; nothing is booked then. Who dies before using its slot
    costs the others one interval, and nothing else.
    """
    parameters = {"origin": origin, "interval": interval, "max_wait": max_wait}
    wait: float | None = connection.execute(_RESERVE_SLOT, parameters).scalar_one_or_none()
    return wait


_HOLD_HOST = text("""
    INSERT INTO monitor.hosts AS h (origin, next_at)
    VALUES (:origin, clock_timestamp() + make_interval(secs => :seconds))
    ON CONFLICT (origin) DO UPDATE SET next_at = greatest(h.next_at, excluded.next_at)""")


def hold_host(connection: Connection, origin: str, *, seconds: float) -> None:
    """The host asked for a pause (Retry-After): nobody goes there for so long."""
    connection.execute(_HOLD_HOST, {"origin": origin, "seconds": seconds})


_READ_ROBOTS = text("""
    SELECT robots FROM monitor.hosts
     WHERE origin = :origin AND robots_read_at > clock_timestamp() - make_interval(secs => :max_age)""")


def read_robots(connection: Connection, origin: str, *, max_age: float) -> str | None:
    """The host's robots.txt as some worker read it, if that was at most `max_age` seconds ago."""
    robots: str | None = connection.execute(_READ_ROBOTS, {"origin": origin, "max_age": max_age}).scalar_one_or_none()
    return robots


_SAVE_ROBOTS = text("""
    INSERT INTO monitor.hosts AS h (origin, robots, robots_read_at) VALUES (:origin, :robots, clock_timestamp())
    ON CONFLICT (origin) DO UPDATE SET robots = excluded.robots, robots_read_at = excluded.robots_read_at""")


def save_robots(connection: Connection, origin: str, robots: str) -> None:
    connection.execute(_SAVE_ROBOTS, {"origin": origin, "robots": robots})
