"""The monitor's tables, in the Postgres schema `monitor` of Byrd's database, so that captures and checkpoints share
transactions."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.schema import CreateSchema

metadata = MetaData(
    schema="monitor",
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    },
)

competitors = Table(
    "competitors",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("base_url", Text, nullable=False, unique=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

checks = Table(  # one look at a competitor: one run of the workflow `monitor.check`
    "checks",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("competitor_id", ForeignKey(competitors.c.id), nullable=False),
    Column("previous_run_id", ForeignKey("monitor.checks.run_id")),  # what this check compares with; null: the first
    Column("disallowed", Integer, nullable=False),  # pages that robots.txt keeps from us
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("finished_at", DateTime(timezone=True)),
    CheckConstraint("disallowed >= 0", name="disallowed_check"),
    CheckConstraint("finished_at >= started_at", name="finished_after_started_check"),
)
Index("checks_latest_idx", checks.c.competitor_id, checks.c.finished_at, postgresql_where=checks.c.finished_at != None)  # noqa: E711 - becomes IS NOT NULL

pages = Table(
    "pages",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("competitor_id", ForeignKey(competitors.c.id), nullable=False),
    Column("url", Text, nullable=False),
    UniqueConstraint("competitor_id", "url"),
)

listings = Table(  # the pages that a check set out to capture
    "listings",
    metadata,
    Column("run_id", ForeignKey(checks.c.run_id, ondelete="CASCADE"), primary_key=True),
    Column("page_id", ForeignKey(pages.c.id), primary_key=True),
)

contents = Table(  # extracted text, stored once however often it is captured
    "contents",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("document", JSONB, nullable=False),
    CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name="sha256_check"),
)

captures = Table(  # the primary key is what makes a page recorded once per run
    "captures",
    metadata,
    Column("run_id", ForeignKey(checks.c.run_id, ondelete="CASCADE"), primary_key=True),
    Column("page_id", ForeignKey(pages.c.id), primary_key=True),
    Column("status", Integer),
    Column("error", Text),  # why there is no answer, nor will be one for this run
    Column("etag", Text),
    Column("last_modified", Text),
    Column("content_sha256", ForeignKey(contents.c.sha256)),
    Column("captured_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    CheckConstraint("status IN (200, 304, 404, 410)", name="status_check"),
    CheckConstraint("num_nonnulls(status, error) = 1", name="status_or_error_check"),
    CheckConstraint("coalesce(status IN (200, 304), false) = (content_sha256 IS NOT NULL)", name="content_check"),
)
Index("captures_latest_idx", captures.c.page_id, captures.c.captured_at.desc())

changes = Table(
    "changes",
    metadata,
    Column("run_id", ForeignKey(checks.c.run_id, ondelete="CASCADE"), primary_key=True),
    Column("page_id", ForeignKey(pages.c.id), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("similarity", Double, nullable=False),
    Column("detail", JSONB, nullable=False),
    CheckConstraint("kind IN ('added', 'removed', 'edited', 'price')", name="kind_check"),
    CheckConstraint("similarity BETWEEN 0 AND 1", name="similarity_check"),
)

reports = Table(
    "reports",
    metadata,
    Column("run_id", ForeignKey(checks.c.run_id, ondelete="CASCADE"), primary_key=True),
    Column("summary", JSONB, nullable=False),
    Column("html", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

notifications = Table(
    "notifications",
    metadata,
    Column("run_id", ForeignKey(checks.c.run_id, ondelete="CASCADE"), primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("target", Text, nullable=False),
    Column("sent_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("channel IN ('webhook', 'mail_file', 'smtp')", name="channel_check"),
)

hosts = Table(  # per origin: when the next request may start, and what its robots.txt says
    "hosts",
    metadata,
    Column("origin", Text, primary_key=True),
    Column("next_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("robots", Text),
    Column("robots_read_at", DateTime(timezone=True)),
    CheckConstraint("(robots IS NULL) = (robots_read_at IS NULL)", name="robots_check"),
)


def create_tables(connection: Connection) -> None:
    """Create what is missing; safe to call from several processes at once."""
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('monitor.schema'))"))
    connection.execute(CreateSchema("monitor", if_not_exists=True))
    metadata.create_all(connection)
