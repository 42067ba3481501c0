"""What must hold in Byrd's tables at any moment, whatever was killed: one query, hence one snapshot.

Use it on a live database as well as after a test: a transition is one transaction, so nobody can see it half done.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from byrd.store.database import Store
from byrd.store.rows import query

_FINAL_RUN = "('succeeded','failed','cancelled')"
_OPEN_STEP = "('pending','ready','running','waiting')"
#: An operator has done what the compensation ``s`` should do.
_BY_HAND = """(s.kind = 'compensation' AND EXISTS (SELECT 1 FROM byrd.events e
    WHERE e.run_id = s.run_id AND e.step_no = s.no AND e.event = 'done_by_hand'))"""
#: The step ``s`` has a result, or an attempt that neither raised nor was replaced, nor asked to be ignored.
_MAY_HAVE_TAKEN_EFFECT = """(s.status = 'succeeded' OR EXISTS (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id
    AND a.outcome NOT IN ('failed','retried','replaced')
    AND NOT (a.outcome = 'cancelled' AND a.error::json->>'exc_type' = 'Ignore')))"""

#: Each selects (run_id, no, detail) of what breaks it.
RULES = {
    "a run that has ended has no open step": f"""
        SELECT s.run_id, s.no, s.status FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE r.status IN {_FINAL_RUN} AND s.status IN {_OPEN_STEP}""",
    "a run that is open has a step that can go on": """
        SELECT r.id, NULL, r.status FROM byrd.runs r
         WHERE r.status IN ('running','paused','cancelling','compensating') AND NOT EXISTS
           (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND (s.status = 'running'
             OR s.status IN ('ready','waiting') AND (s.kind = 'compensation' OR r.status <> 'compensating')))""",
    "a run that is being cancelled starts nothing more": """
        SELECT s.run_id, s.no, s.status FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE r.status = 'cancelling' AND s.status IN ('pending','ready','waiting') AND s.kind <> 'compensation'
           AND NOT (s.kind = 'saga' AND s.status = 'waiting')""",
    "a rollback is stuck on a compensation that did not succeed": """
        SELECT r.id, NULL, r.status FROM byrd.runs r WHERE r.status = 'rollback_stuck' AND NOT EXISTS
           (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND s.kind = 'compensation'
             AND s.status IN ('failed','cancelled'))""",
    "nothing but compensations is open in a rollback": f"""
        SELECT s.run_id, s.no, s.kind FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE (r.status = 'compensating' OR r.status = 'rollback_stuck' AND EXISTS
                 (SELECT 1 FROM byrd.steps c WHERE c.run_id = r.id AND c.kind = 'compensation' AND c.saga IS NULL))
           AND s.kind <> 'compensation' AND s.status IN {_OPEN_STEP}""",
    "a saga that has failed is seen to": """
        SELECT s.run_id, s.no, s.wake_at::text FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE s.kind = 'saga' AND s.status = 'waiting' AND s.wake_at = 'infinity'
           AND r.status IN ('running','cancelling')
           AND NOT EXISTS (SELECT 1 FROM byrd.steps c WHERE c.run_id = s.run_id AND c.saga = s.no
                            AND c.kind = 'compensation' AND c.status IN ('ready','running'))""",
    "nothing of a saga that has ended badly is open": f"""
        SELECT s.run_id, s.no, s.status FROM byrd.steps s
          JOIN byrd.steps g ON g.run_id = s.run_id AND g.no = s.saga
         WHERE g.status = 'failed' AND s.status IN {_OPEN_STEP}""",
    "nothing runs in a saga that is undone": f"""
        SELECT s.run_id, s.no, s.status FROM byrd.steps c
          JOIN byrd.steps s ON s.run_id = c.run_id AND s.saga = c.saga AND s.kind <> 'compensation'
         WHERE c.kind = 'compensation' AND s.status IN {_OPEN_STEP}""",
    "nothing is rolled back after a pivot": """
        SELECT c.run_id, c.no, r.pivot::text FROM byrd.steps c JOIN byrd.runs r ON r.id = c.run_id
          JOIN byrd.steps p ON p.run_id = r.id AND p.no = r.pivot
         WHERE c.kind = 'compensation' AND c.saga IS NULL""",
    "a run that succeeded has no task that did not": """
        SELECT s.run_id, s.no, s.status FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE r.status = 'succeeded' AND s.kind IN ('task','saga','callback') AND s.status <> 'succeeded'""",
    "a run that failed says why": "SELECT id, NULL, status FROM byrd.runs WHERE status = 'failed' AND error IS NULL",
    "a run has its output": """
        SELECT r.id, r.output, r.status FROM byrd.runs r WHERE NOT EXISTS
           (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND s.no = r.output)""",
    "a run ends once, and once more after each retry": f"""
        SELECT r.id, NULL, e.ends || ' ends, ' || e.retries || ' retries' FROM byrd.runs r, LATERAL
           (SELECT count(*) FILTER (WHERE event IN {_FINAL_RUN}) AS ends,
                   count(*) FILTER (WHERE event IN ('retried','rollback_requested')) AS retries,
                   count(*) FILTER (WHERE event = 'submitted') AS submits FROM byrd.events WHERE run_id = r.id) e
         WHERE e.ends <> e.retries + (r.status IN {_FINAL_RUN})::int OR e.submits <> 1""",
    "a join waits for its members that are not done": f"""
        SELECT j.run_id, j.no, j.waiting || ' counted, ' || m.open || ' open' FROM byrd.steps j, LATERAL
           (SELECT count(*) AS open FROM byrd.steps m WHERE m.run_id = j.run_id AND m.join_no = j.no
             AND m.status IN {_OPEN_STEP}) m
         WHERE j.status = 'pending' AND (j.kind IN ('join','saga') OR j.replaced) AND j.waiting <> m.open""",
    "a join whose members are done has ended": """
        SELECT j.run_id, j.no, 'waits for nothing' FROM byrd.steps j
          LEFT JOIN byrd.steps p ON p.run_id = j.run_id AND p.no = j.after
         WHERE j.status = 'pending' AND (j.kind IN ('join','saga') OR j.replaced) AND j.waiting = 0
           AND (NOT j.on_failure AND (j.after IS NULL OR p.status = 'succeeded')
                OR EXISTS (SELECT 1 FROM byrd.steps m WHERE m.run_id = j.run_id AND m.join_no = j.no))""",
    "a join succeeds with all its members": """
        SELECT j.run_id, j.no, m.no || ' ' || m.status FROM byrd.steps j
          JOIN byrd.steps m ON m.run_id = j.run_id AND m.join_no = j.no
         WHERE j.status = 'succeeded' AND m.status <> 'succeeded' AND m.kind <> 'item'""",
    "a step whose predecessor is done does not wait": """
        SELECT s.run_id, s.no, coalesce(p.status, 'first') FROM byrd.steps s
          LEFT JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
         WHERE s.status = 'pending' AND s.kind NOT IN ('join','saga','item','compensation') AND NOT s.replaced
           AND (s.after IS NULL OR p.status = CASE WHEN s.on_failure THEN 'failed' ELSE 'succeeded' END)""",
    "a step whose predecessor failed does not wait": """
        SELECT s.run_id, s.no, p.status FROM byrd.steps s
          JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
         WHERE s.status = 'pending' AND s.kind <> 'compensation' AND (s.kind <> 'join' OR NOT s.on_failure)
           AND p.status IN ('failed','skipped','cancelled') AND NOT (s.on_failure AND s.replaced)""",
    "a step starts after its predecessor only": """
        SELECT s.run_id, s.no, s.status || ' after ' || p.status FROM byrd.steps s
          JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
         WHERE (s.status IN ('ready','running','waiting','succeeded') OR s.status = 'failed' AND s.attempt > 0)
           AND NOT s.replaced
           AND NOT (CASE WHEN s.on_failure THEN p.status IN ('failed','cancelled') ELSE p.status = 'succeeded' END)""",
    "each attempt is accounted for, once": f"""
        SELECT s.run_id, s.no, s.attempt || ' attempts, ' || a.ended || ' ended, ' || s.status
          FROM byrd.steps s, LATERAL
            (SELECT count(*) AS ended FROM byrd.attempts a WHERE a.step_id = s.id AND a.attempt <= s.attempt) a
         WHERE s.kind NOT IN ('join','wait','saga') AND NOT (s.kind = 'errback' AND s.attempt > a.ended)
           AND NOT {_BY_HAND}
           AND s.attempt <> a.ended + (s.status = 'running' OR s.status = 'succeeded' AND NOT s.replaced)::int""",
    "an attempt that ended otherwise neither runs nor completed the step": f"""
        SELECT s.run_id, s.no, a.outcome || ', ' || s.status FROM byrd.steps s
          JOIN byrd.attempts a ON a.step_id = s.id AND a.attempt >= s.attempt
         WHERE a.attempt > s.attempt OR s.status = 'running'
            OR s.status = 'succeeded' AND NOT s.replaced AND NOT {_BY_HAND}""",
    "a running step's worker is on record": """
        SELECT s.run_id, s.no, s.worker_id::text FROM byrd.steps s WHERE s.status = 'running'
           AND NOT EXISTS (SELECT 1 FROM byrd.workers w WHERE w.id = s.worker_id)""",
    "a ready step of a run that moves is in the relay's sight": """
        SELECT s.run_id, s.no, s.wake_at::text FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE s.status = 'ready' AND s.wake_at = 'infinity' AND r.status IN ('running','compensating')
           AND NOT (s.run_at = 'infinity' AND (s.signal IS NOT NULL OR EXISTS
             (SELECT 1 FROM byrd.steps o JOIN byrd.runs c ON c.parent_step = o.id
               WHERE o.run_id = s.run_id AND o.no = coalesce(s.compensates, s.no)
                 AND (c.finished_at IS NULL OR NOT c.parent_told)) OR EXISTS
             (SELECT 1 FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item'
                 AND m.status IN ('ready','running'))))""",
    "an each counts its items": """
        SELECT s.run_id, s.no, c.counted || ' counted, ' || m.found FROM byrd.steps s, LATERAL
           (SELECT concat_ws(' ', completed, failed, cursor::json ->> 'active', cursor::json ->> 'waiting') AS counted,
                   completed, failed, (cursor::json ->> 'active')::int AS active,
                   (SELECT coalesce(sum((w ->> 1)::int - (w ->> 0)::int + 1), 0)
                      FROM json_array_elements(cursor::json -> 'waiting') w) AS waiting
              FROM byrd.checkpoints WHERE step_id = s.id AND name = 'items') c, LATERAL
           (SELECT count(*) FILTER (WHERE m.status = 'succeeded') AS completed,
                   count(*) FILTER (WHERE m.status IN ('ready','running')) AS active,
                   count(*) FILTER (WHERE m.status = 'pending') AS waiting,
                   string_agg(m.status, ' ' ORDER BY m.no) AS found
              FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item') m
          WHERE s.task = 'byrd.each' AND s.status = 'ready' AND s.run_at = 'infinity'
            AND (c.completed, c.active, c.waiting) IS DISTINCT FROM (m.completed, m.active, m.waiting)""",
    "an each has no more items under way than it may": """
        SELECT s.run_id, s.no, m.active::text FROM byrd.steps s
          JOIN byrd.checkpoints c ON c.step_id = s.id AND c.name = 'items', LATERAL
           (SELECT count(*) AS active FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no
               AND m.kind = 'item' AND m.status IN ('ready','running')) m
         WHERE s.task = 'byrd.each' AND m.active > (c.cursor::json ->> 'limit')::int""",
    "an item that has not ended has an each that has not": f"""
        SELECT m.run_id, m.no, m.status || ' in ' || s.status FROM byrd.steps m
          JOIN byrd.steps s ON s.run_id = m.run_id AND s.no = m.join_no
         WHERE m.kind = 'item' AND m.status IN ('pending','ready') AND s.status NOT IN {_OPEN_STEP}""",
    "a task that gave its slot back for a signal that came goes on": """
        SELECT s.run_id, s.no, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE s.status = 'ready' AND s.signal IS NOT NULL AND s.run_at > clock_timestamp()
           AND r.status IN ('running','compensating','cancelling','rollback_stuck')
           AND EXISTS (SELECT 1 FROM byrd.signals g WHERE g.run_id = s.run_id AND g.name = s.signal
                        AND g.delivered_at IS NULL)
           AND NOT EXISTS (SELECT 1 FROM byrd.steps o WHERE o.run_id = s.run_id AND o.no <> s.no
                            AND o.signal = s.signal AND o.status IN ('waiting','ready','running'))""",
    "a wait of a run that moves is ended in its time": """
        SELECT s.run_id, s.no, s.run_at || ', ' || s.wake_at FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE s.status = 'waiting' AND s.kind = 'wait' AND r.status = 'running'
           AND s.wake_at > greatest(coalesce(s.run_at, 'infinity'), clock_timestamp())""",
    "a wait has no attempt": """
        SELECT s.run_id, s.no, s.attempt::text FROM byrd.steps s WHERE s.kind = 'wait' AND s.attempt > 0""",
    "a signal is delivered to a step that waits for it": """
        SELECT g.run_id, g.step_no, g.name FROM byrd.signals g
          LEFT JOIN byrd.steps s ON s.run_id = g.run_id AND s.no = g.step_no AND (s.signal = g.name OR s.kind <> 'wait')
         WHERE g.delivered_at IS NOT NULL AND s.no IS NULL""",
    "a signal that is awaited is about to be delivered": """
        SELECT s.run_id, s.no, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
         WHERE s.status = 'waiting' AND s.signal IS NOT NULL AND r.status IN ('running','paused','rollback_stuck')
           AND (s.expires_at IS NULL OR s.expires_at > s.ready_at)
           AND EXISTS (SELECT 1 FROM byrd.signals g WHERE g.run_id = s.run_id AND g.name = s.signal
                        AND g.delivered_at IS NULL)
           AND NOT EXISTS (SELECT 1 FROM byrd.steps o WHERE o.run_id = s.run_id AND o.status = 'waiting'
                            AND o.signal = s.signal AND o.wake_at <= clock_timestamp())""",
    "a step that waits for a limit is looked for": """
        SELECT s.run_id, s.no, s.limit_name || ' of ' || s.limit_key FROM byrd.steps s
          LEFT JOIN byrd.limit_keys k ON k.name = s.limit_name AND k.key = s.limit_key
         WHERE s.status = 'ready' AND s.limit_no IS NOT NULL AND s.limit_slot IS NULL AND s.wake_at < 'infinity'
           AND k.next_at IS NULL""",
    "a compensation undoes a step that has, or may have, taken effect": """
        SELECT c.run_id, c.no, s.status FROM byrd.steps c
          JOIN byrd.steps s ON s.run_id = c.run_id AND s.no = c.compensates
         WHERE s.compensation IS NULL AND s.task <> 'byrd.workflow'
            OR s.status IN ('pending','ready','running','waiting')
            OR s.status <> 'succeeded' AND NOT EXISTS (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id)""",
    "a rollback undoes all that has, or may have, taken effect": f"""
        SELECT s.run_id, s.no, s.status FROM byrd.steps s
         WHERE s.compensation IS NOT NULL AND {_MAY_HAVE_TAKEN_EFFECT}
           AND EXISTS (SELECT 1 FROM byrd.steps c WHERE c.run_id = s.run_id AND c.kind = 'compensation'
                        AND (c.saga IS NULL OR c.saga = s.saga))
           AND NOT EXISTS (SELECT 1 FROM byrd.steps c WHERE c.run_id = s.run_id AND c.compensates = s.no)""",
    "a compensation waits for all that is undone before": """
        SELECT c.run_id, c.no, b.no || ' is ' || b.status FROM byrd.steps c
          JOIN byrd.steps b ON b.run_id = c.run_id AND b.kind = 'compensation' AND b.rank < c.rank
           AND b.saga IS NOT DISTINCT FROM c.saga
         WHERE c.kind = 'compensation' AND c.status <> 'pending' AND b.status NOT IN ('succeeded','skipped')""",
    "of two steps that followed one another the later is undone first": """
        SELECT a.run_id, a.no, b.compensates || ' follows ' || a.compensates FROM byrd.steps a
          JOIN byrd.steps b ON b.run_id = a.run_id AND b.kind = 'compensation' AND b.saga IS NOT DISTINCT FROM a.saga
          JOIN byrd.steps sb ON sb.run_id = b.run_id AND sb.no = b.compensates
         WHERE a.kind = 'compensation' AND sb.after = a.compensates AND b.rank >= a.rank""",
}

_ALL = "\nUNION ALL\n".join(
    f"SELECT '{rule.replace(chr(39), chr(39) * 2)}' AS rule, run_id::text, no::int, detail::text"
    f" FROM ({sql}) AS broken (run_id, no, detail)"
    for rule, sql in RULES.items()
)


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that breaks a rule."""

    rule: str
    run_id: str
    no: int | None
    detail: str | None

    def __str__(self) -> str:
        return f"{self.rule}: run {self.run_id}, step {self.no}: {self.detail}"


def broken_rows(conn: Connection) -> list[Broken]:
    """Return each row that breaks a rule."""
    # Planning this takes ten times as long as running it, so each connection plans it once.
    if not query(conn, "SELECT 1 FROM pg_prepared_statements WHERE name = 'byrd_invariants'").first():
        query(conn, f"PREPARE byrd_invariants AS {_ALL}")
    return [Broken(*row) for row in query(conn, "EXECUTE byrd_invariants")]


def broken_invariants(conn: Connection) -> list[str]:
    """Return a line for each row that breaks a rule."""
    return [str(row) for row in broken_rows(conn)]


def check_invariants(conn: Connection) -> None:
    """Fail with all that is wrong in the database."""
    broken = broken_invariants(conn)
    if broken:
        raise AssertionError("\n".join(broken))


def check_database(url: str) -> None:
    """Fail with all that is wrong in the database at ``url``."""
    store = Store(url)
    try:
        store.run(check_invariants)
    finally:
        store.close()
