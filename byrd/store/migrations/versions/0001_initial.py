"""The tables of Byrd 0.1: runs and steps, what they leave behind, what they wait for, and who works at them.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from byrd.store.migrations.limits import ADMIT, GIVE_PLACES, LINE_UP, PLACE_FREED
from byrd.store.migrations.outcome import OUTCOME
from byrd.store.migrations.rules import RUN_RULES, SET_TIMEOUT, STEP_RULES, trigger_of
from byrd.store.migrations.work import WORK
from byrd.store.migrations.write_runs import WRITE_RUN, WRITE_RUNS

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SCHEMA = "byrd"
OUTCOMES = "'failed','retried','preempted','handed_back','replaced','cancelled'"


def _now() -> sa.TextClause:
    return sa.text("clock_timestamp()")


def _time(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=None if nullable else _now())


def _zero(name: str, kind: type[sa.types.TypeEngine[Any]] = sa.Integer) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, server_default=sa.text("0"))


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", pg.UUID(as_uuid=False), primary_key=True),
        sa.Column("workflow", sa.Text),
        sa.Column("title", sa.Text, nullable=False, server_default=""),
        sa.Column("key", sa.Text),
        sa.Column("args", sa.Text),
        sa.Column("status", sa.Text, nullable=False, server_default="running"),
        sa.Column("output", sa.Integer, nullable=False),
        # How a run that is being stopped or rolled back will end, and whether to compensate first.
        sa.Column("outcome", sa.Text),
        sa.Column("compensate", sa.Boolean, nullable=False, server_default=sa.false()),
        # From when on the workers end what a run that is being cancelled still runs.
        _time("terminate_at"),
        # The step after which it goes forward only, once that has succeeded.
        sa.Column("pivot", sa.Integer),
        sa.Column("error", sa.Text),
        _time("created_at", nullable=False),
        _time("finished_at"),
        _time("deadline"),
        # Of a sub-workflow: the step that it is the work of, and whether that, or what undoes it, was told of its end.
        sa.Column("parent_step", sa.Text),
        sa.Column("parent_told", sa.Boolean, nullable=False, server_default=sa.false()),
        schema=SCHEMA,
    )
    # A second submit of the same workflow with the same key finds this row: the unique key is the guard.
    op.execute("CREATE UNIQUE INDEX runs_key ON byrd.runs (coalesce(workflow, ''), key) WHERE key IS NOT NULL")
    op.execute("CREATE INDEX runs_created ON byrd.runs (created_at DESC)")
    op.execute("CREATE INDEX runs_workflow ON byrd.runs (workflow, created_at DESC) WHERE workflow IS NOT NULL")
    op.execute("CREATE INDEX runs_status ON byrd.runs (status, created_at DESC)")
    op.execute(trigger_of("runs", RUN_RULES))
    op.execute(
        "CREATE INDEX runs_terminate ON byrd.runs (terminate_at)"
        " WHERE status = 'cancelling' AND terminate_at IS NOT NULL"
    )
    op.execute("CREATE UNIQUE INDEX runs_parent ON byrd.runs (parent_step) WHERE parent_step IS NOT NULL")
    op.execute(
        "CREATE INDEX runs_of_steps ON byrd.runs (parent_step) WHERE parent_step IS NOT NULL AND finished_at IS NULL"
    )
    op.execute(
        "CREATE INDEX runs_untold ON byrd.runs (finished_at)"
        " WHERE parent_step IS NOT NULL AND NOT parent_told AND (finished_at IS NOT NULL OR status = 'rollback_stuck')"
    )
    op.execute("CREATE INDEX runs_deadline ON byrd.runs (deadline) WHERE finished_at IS NULL AND deadline IS NOT NULL")


def _steps() -> None:
    op.create_table(
        "steps",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("run_id", pg.UUID(as_uuid=False), sa.ForeignKey("byrd.runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("no", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("task", sa.Text),
        sa.Column("queue", sa.Text),
        sa.Column("args", sa.Text, nullable=False, server_default="[]"),
        sa.Column("kwargs", sa.Text, nullable=False, server_default="{}"),
        sa.Column("options", sa.Text, nullable=False, server_default="{}"),
        sa.Column("compensation", sa.Text),
        # The edges: what must be done first, whose value is the first argument, which join gets the value.
        sa.Column("after", sa.Integer),
        sa.Column("on_failure", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("input", sa.Integer),
        sa.Column("join_no", sa.Integer),
        sa.Column("join_pos", sa.Integer),
        # The saga that it is a step of, the innermost, which is a step, too; of a compensation, whose rollback it is a
        # part of; NULL is the run's own.
        sa.Column("saga", sa.Integer),
        sa.Column("mark", sa.Text),
        # Of a compensation: which step it undoes, and when; those of a rank wait for all of lower ones.
        sa.Column("compensates", sa.Integer),
        sa.Column("rank", sa.Integer),
        _zero("waiting"),
        sa.Column("replaced", sa.Boolean, nullable=False, server_default=sa.false()),
        # It runs only by a message of its own, for what that message bears, or Celery counts messages for.
        sa.Column("solo", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("group_id", sa.Text),
        sa.Column("countdown", sa.Float),
        _time("eta"),
        sa.Column("expires_in", sa.Float),
        _time("expires_at"),
        # Of a wait, whose time is in countdown and eta: the signal, if it waits for one, and its value (JSON) when its
        # time comes; a sleep that has an input passes that on instead.  A task that has given its slot back for a
        # signal has one, too.  signal_of: who is to send it, for those who list what awaits whom.
        sa.Column("signal", sa.Text),
        sa.Column("signal_of", sa.Text),
        sa.Column("fallback", sa.Text),
        # Of a step whose task has a limit: by which key it waits for its turn, with which ticket, and since when, or
        # from when on, it has a place.
        sa.Column("limit_name", sa.Text),
        sa.Column("limit_key", sa.Text),
        sa.Column("limit_no", sa.BigInteger),
        _time("limit_slot"),
        # Of a step that has time-outs: until when it is to be started, and when somebody is to look at it.
        _time("start_by"),
        _time("timeout_at"),
        # When the first of the attempts began that its retries are for.
        _time("tried_since"),
        # Where it stands.
        sa.Column("status", sa.Text, nullable=False, server_default="pending"),
        _zero("attempt"),
        _zero("retries"),
        _zero("preemptions"),
        _zero("sends"),
        _time("run_at"),
        _time("wake_at"),
        _time("ready_at"),
        # For `byrd why`: when it was last published again, and when last because its message was not there any more.
        _time("sent_at"),
        _time("lost_at"),
        _time("started_at"),
        _time("finished_at"),
        sa.Column("worker_id", pg.UUID(as_uuid=False)),
        sa.Column("pid", sa.Integer),
        sa.Column("claim", pg.UUID(as_uuid=False)),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("cause", sa.Integer),
        sa.UniqueConstraint("run_id", "no", name="steps_run_no"),
        schema=SCHEMA,
        postgresql_with={"fillfactor": "80"},
    )
    op.execute(trigger_of("steps", STEP_RULES, before=SET_TIMEOUT))
    op.execute(
        "CREATE UNIQUE INDEX steps_compensates ON byrd.steps (run_id, compensates) WHERE compensates IS NOT NULL"
    )
    op.execute("CREATE INDEX steps_after ON byrd.steps (run_id, after) WHERE after IS NOT NULL")
    op.execute("CREATE INDEX steps_join ON byrd.steps (run_id, join_no) WHERE join_no IS NOT NULL")
    op.execute("CREATE INDEX steps_open ON byrd.steps (run_id) WHERE status IN ('pending','ready','running','waiting')")
    # A ready step is in one of these three: to be published when its time comes, or published and not yet taken, by its
    # own message or by whoever is awake.
    op.execute("CREATE INDEX steps_due ON byrd.steps (wake_at) WHERE status = 'ready' AND sends = 0")
    op.execute("CREATE INDEX steps_sent ON byrd.steps (queue, wake_at) WHERE status = 'ready' AND sends > 0 AND solo")
    op.execute(
        "CREATE INDEX steps_shared ON byrd.steps (queue, wake_at) WHERE status = 'ready' AND sends > 0 AND NOT solo"
    )
    op.execute("CREATE INDEX steps_waiting ON byrd.steps (wake_at) WHERE status = 'waiting'")
    op.execute(
        "CREATE INDEX steps_awaiting ON byrd.steps (ready_at)"
        " WHERE signal IS NOT NULL AND status IN ('waiting','ready')"
    )
    op.execute("CREATE INDEX steps_running ON byrd.steps (worker_id) WHERE status = 'running'")
    op.execute("CREATE INDEX steps_timeout ON byrd.steps (timeout_at) WHERE timeout_at IS NOT NULL")
    op.execute("CREATE INDEX steps_placed ON byrd.steps (limit_name, limit_key) WHERE limit_slot IS NOT NULL")
    op.execute(
        """CREATE INDEX steps_unplaced ON byrd.steps (limit_name, limit_key, limit_no)
           WHERE status = 'ready' AND limit_no IS NOT NULL AND limit_slot IS NULL AND wake_at < 'infinity'"""
    )


def _progress() -> None:
    def step() -> sa.Column[Any]:
        return sa.Column("step_id", sa.Text, sa.ForeignKey("byrd.steps.id", ondelete="CASCADE"), nullable=False)

    op.create_table(
        "checkpoints",
        step(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("cursor", sa.Text),
        _zero("completed", sa.BigInteger),
        _zero("failed", sa.BigInteger),
        sa.Column("value", sa.Text),
        sa.Column("done", sa.Boolean, nullable=False, server_default=sa.false()),
        _time("updated_at", nullable=False),
        sa.PrimaryKeyConstraint("step_id", "name"),
        sa.CheckConstraint("completed >= 0 AND failed >= 0", name="checkpoint_counts"),
        schema=SCHEMA,
    )
    op.create_table(
        "failed_items",
        step(),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("cursor", sa.Text, nullable=False),
        sa.Column("item", sa.Text, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("quarantined", sa.Boolean, nullable=False),
        _time("retry_at", nullable=False),
        sa.PrimaryKeyConstraint("step_id", "name", "cursor"),
        sa.CheckConstraint("tries >= 1", name="failed_item_tried"),
        schema=SCHEMA,
    )
    op.create_table(
        "attempts",
        step(),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("worker", sa.Text),
        _time("started_at"),
        _time("ended_at", nullable=False),
        # An attempt ends once: a second record of the same one is refused.
        sa.PrimaryKeyConstraint("step_id", "attempt"),
        sa.CheckConstraint(f"outcome IN ({OUTCOMES})", name="attempt_outcome_known"),
        schema=SCHEMA,
    )


def _events_and_workers() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("run_id", pg.UUID(as_uuid=False), sa.ForeignKey("byrd.runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("step_no", sa.Integer),
        _time("at", nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("detail", sa.Text),
        # Of the command that left the event: the command is not carried out twice when its answer was lost.
        sa.Column("token", pg.UUID(as_uuid=False)),
        schema=SCHEMA,
    )
    op.execute("CREATE INDEX events_run ON byrd.events (run_id, id)")
    op.execute("CREATE UNIQUE INDEX events_token ON byrd.events (token) WHERE token IS NOT NULL")
    op.create_table(
        "workers",
        sa.Column("id", pg.UUID(as_uuid=False), primary_key=True),
        sa.Column("hostname", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        _zero("concurrency"),
        sa.Column("queues", pg.ARRAY(sa.Text), nullable=False),
        sa.Column("tasks", pg.ARRAY(sa.Text), nullable=False),
        # The tasks of which its slices may claim steps.
        sa.Column("shares", pg.ARRAY(sa.Text), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("version", sa.Text, nullable=False),
        _time("started_at", nullable=False),
        _time("heartbeat_at", nullable=False),
        _time("lease_until", nullable=False),
        sa.Column("stopping", sa.Boolean, nullable=False, server_default=sa.false()),
        schema=SCHEMA,
    )
    op.execute("CREATE INDEX workers_lease ON byrd.workers (lease_until)")
    # The brokers that were seen to hold their mark: one that has none now has lost its messages.
    op.create_table(
        "brokers", sa.Column("mark", sa.Text, primary_key=True), _time("marked_at", nullable=False), schema=SCHEMA
    )


def _notices() -> None:
    # What somebody outside is to be told, at least once: that a rollback is stuck.
    op.create_table(
        "notices",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("run_id", pg.UUID(as_uuid=False), sa.ForeignKey("byrd.runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("step_no", sa.Integer, nullable=False),
        _time("at", nullable=False),
        # When it is to be told, or told again unless whoever tells it just now says that it is done.
        _time("due_at", nullable=False),
        _zero("tries"),
        # Who has been told, by the setting's words: they are not told again when others could not be.
        sa.Column("told", pg.ARRAY(sa.Text), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("error", sa.Text),
        _time("delivered_at"),
        sa.CheckConstraint("tries >= 0", name="notice_counts"),
        schema=SCHEMA,
    )
    op.execute("CREATE INDEX notices_due ON byrd.notices (due_at) WHERE delivered_at IS NULL")
    op.execute("CREATE INDEX notices_run ON byrd.notices (run_id)")


def _signals() -> None:
    op.create_table(
        "signals",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("run_id", pg.UUID(as_uuid=False), sa.ForeignKey("byrd.runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        _time("sent_at", nullable=False),
        # The wait that has it: one signal, one wait.
        sa.Column("step_no", sa.Integer),
        _time("delivered_at"),
        sa.CheckConstraint("(step_no IS NULL) = (delivered_at IS NULL)", name="signal_delivered_to_step"),
        schema=SCHEMA,
    )
    op.execute("CREATE INDEX signals_run ON byrd.signals (run_id)")
    op.execute("CREATE INDEX signals_kept ON byrd.signals (run_id, name, id) WHERE delivered_at IS NULL")
    op.execute(_SIGNAL)


def _limits() -> None:
    op.create_table(
        "limits",
        sa.Column("name", sa.Text, primary_key=True),
        # As the code declares it: a rate is a token every so many seconds, none is 0.
        sa.Column("rate", sa.Text),
        sa.Column("every", sa.Float, nullable=False, server_default=sa.text("0")),
        sa.Column("burst", sa.Integer, nullable=False, server_default=sa.text("1")),
        sa.Column("concurrency", sa.Integer),
        _time("declared_at", nullable=False),
        # As somebody has set it since: NULL is as declared; a concurrency of -1 is none.
        sa.Column("set_rate", sa.Text),
        sa.Column("set_every", sa.Float),
        sa.Column("set_burst", sa.Integer),
        sa.Column("set_concurrency", sa.Integer),
        sa.Column("set_by", sa.Text),
        _time("set_at"),
        sa.CheckConstraint("every >= 0 AND burst >= 1 AND concurrency >= 1", name="limit_counts"),
        sa.CheckConstraint("set_every >= 0 AND set_burst >= 1 AND set_concurrency >= -1", name="limit_set_counts"),
        sa.CheckConstraint("(rate IS NULL) = (every = 0)", name="limit_rate_is_spacing"),
        sa.CheckConstraint(
            "(set_rate IS NULL) = (set_every IS NULL) AND (set_rate = 'none') = (set_every = 0)",
            name="limit_set_rate_is_spacing",
        ),
        schema=SCHEMA,
    )
    op.create_table(
        "limit_keys",
        sa.Column("name", sa.Text, sa.ForeignKey("byrd.limits.name", ondelete="CASCADE"), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        # When the next call would come if they came as they should (GCRA), and when the last that waits may start.
        _time("tat"),
        _time("tail"),
        _time("parked_until"),
        # When to look whether there is something to give to those who wait; NULL while nobody does.
        _time("next_at"),
        _time("seen_at", nullable=False),
        sa.PrimaryKeyConstraint("name", "key"),
        schema=SCHEMA,
        postgresql_with={"fillfactor": "80"},
    )
    op.execute("CREATE INDEX limit_keys_next ON byrd.limit_keys (next_at) WHERE next_at IS NOT NULL")
    op.execute("CREATE INDEX limit_keys_seen ON byrd.limit_keys (seen_at)")
    op.execute("CREATE SEQUENCE byrd.limit_tickets")
    for function in (GIVE_PLACES, ADMIT, LINE_UP, PLACE_FREED):
        op.execute(function)


# The lock is that of byrd.store.locks.own_run: no wait begins while a signal is written, so each sees the other.
_SIGNAL = """
CREATE FUNCTION byrd.signal(run uuid, name text, payload text DEFAULT 'null', sender text DEFAULT session_user,
                            token uuid DEFAULT NULL) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  run_status text;
  signal_id bigint;
BEGIN
  IF signal.name IS NULL OR signal.name !~ '^[A-Za-z0-9_.:/-]{1,200}$' THEN
    RAISE EXCEPTION 'the name of a signal is 1 to 200 letters, digits or any of . : - / _, not %', signal.name
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  PERFORM signal.payload::json;
  PERFORM pg_advisory_xact_lock(1652126308, hashtext(signal.run::text));
  SELECT r.status INTO run_status FROM byrd.runs r WHERE r.id = signal.run FOR NO KEY UPDATE;
  IF run_status IS NULL THEN
    RAISE EXCEPTION 'no run has the id %', signal.run USING ERRCODE = 'no_data_found';
  END IF;
  IF run_status IN ('succeeded', 'failed', 'cancelled') THEN
    RAISE EXCEPTION 'run % is %: a signal needs a run that has not ended', signal.run, run_status
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  INSERT INTO byrd.signals (run_id, name, payload) VALUES (signal.run, signal.name, coalesce(signal.payload, 'null'))
    RETURNING id INTO signal_id;
  INSERT INTO byrd.events (run_id, event, detail, token)
  VALUES (signal.run, 'signalled', json_build_object('signal', signal.name, 'id', signal_id, 'by', signal.sender,
            'payload', CASE WHEN octet_length(signal.payload) <= 1000 THEN signal.payload::json END)::text,
          signal.token);
  -- The relay gives it to the first that waits, and lets the others wait on.  A step that is ready, a compensation's
  -- too, takes it once its run lets it start.
  UPDATE byrd.steps s SET wake_at = least(s.wake_at, clock_timestamp())
   WHERE s.run_id = signal.run AND s.status = 'waiting' AND s.signal = signal.name;
  UPDATE byrd.steps s SET run_at = clock_timestamp(), sends = 0,
         wake_at = CASE WHEN run_status IN ('running', 'compensating', 'cancelling') THEN clock_timestamp()
                        ELSE s.wake_at END
   WHERE s.run_id = signal.run AND s.status = 'ready' AND s.signal = signal.name AND s.run_at > clock_timestamp();
  NOTIFY byrd;
  RETURN signal_id;
END $$
"""


def upgrade() -> None:
    """Create the tables."""
    _runs()
    _steps()
    _progress()
    _events_and_workers()
    _notices()
    _signals()
    _limits()
    for function in (WORK, WRITE_RUNS, WRITE_RUN, OUTCOME):
        op.execute(function)


def downgrade() -> None:
    """Drop the tables, and with them every run."""
    for function in ("signal", "work", "write_runs", "write_run", "outcome"):
        op.execute(f"DROP FUNCTION byrd.{function}")
    op.execute("DROP TRIGGER place_freed ON byrd.steps")
    for function in ("place_freed", "line_up", "admit", "give_places"):
        op.execute(f"DROP FUNCTION byrd.{function}")
    op.execute("DROP SEQUENCE byrd.limit_tickets")
    for table in ("steps", "runs"):
        op.execute(f"DROP TRIGGER legal_{table} ON byrd.{table}")
        op.execute(f"DROP FUNCTION byrd.refuse_illegal_{table}")
    for table in (
        "limit_keys",
        "limits",
        "signals",
        "notices",
        "brokers",
        "workers",
        "events",
        "attempts",
        "failed_items",
        "checkpoints",
        "steps",
        "runs",
    ):
        op.drop_table(table, schema=SCHEMA)
