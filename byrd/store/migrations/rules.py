"""Which rows of runs and steps are illegal: the rules of schema version 0001, and the trigger that refuses.

They are what CHECK constraints would be, and refuse by the same error with the rule's name.  But Postgres reads the
text of each CHECK of a table anew in each statement that writes to it, which for steps took more time than all else
that the statement does (76 of 116 µs on Postgres 18; the trigger takes 6).
"""

from __future__ import annotations

from collections.abc import Mapping

RUN_STATUSES = "'running','paused','cancelling','compensating','rollback_stuck','succeeded','failed','cancelled'"
STEP_STATUSES = "'pending','ready','running','waiting','succeeded','failed','skipped','cancelled'"

RUN_RULES: Mapping[str, str] = {
    "run_status_known": f"NEW.status IN ({RUN_STATUSES})",
    "run_finished_if_final": "(NEW.finished_at IS NOT NULL) = (NEW.status IN ('succeeded','failed','cancelled'))",
    "only_a_cancelled_run_is_terminated": "NEW.terminate_at IS NULL OR NEW.status NOT IN ('running','paused')",
    "run_outcome_known": "NEW.outcome IS NULL OR NEW.outcome IN ('failed','cancelled')",
}

STEP_RULES: Mapping[str, str] = {
    "step_status_known": f"NEW.status IN ({STEP_STATUSES})",
    "step_kind_known": "NEW.kind IN ('task','item','join','wait','saga','callback','errback','compensation')",
    "step_has_task_unless_join": "(NEW.kind = 'join') = (NEW.task IS NULL)",
    "join_never_runs": "NEW.kind <> 'join' OR NEW.status NOT IN ('ready','running')",
    "wait_never_runs": "NEW.kind <> 'wait' OR NEW.status NOT IN ('ready','running')",
    "saga_never_runs": "NEW.kind <> 'saga' OR NEW.status NOT IN ('ready','running')",
    "waiting_is_due": "NEW.status <> 'waiting' OR (NEW.kind IN ('wait','saga') AND NEW.wake_at IS NOT NULL)",
    "item_has_each": "NEW.kind <> 'item' OR (NEW.join_no IS NOT NULL AND NEW.join_pos IS NOT NULL)",
    "signal_of_whom": "NEW.signal_of IS NULL OR NEW.signal IS NOT NULL",
    "fallback_of_wait": "NEW.kind = 'wait' OR NEW.fallback IS NULL",
    "step_running_has_worker": "(NEW.status = 'running') = (NEW.worker_id IS NOT NULL)",
    "step_running_has_claim": "(NEW.status = 'running') = (NEW.claim IS NOT NULL)",
    "step_finished_if_final": """(NEW.finished_at IS NOT NULL)
                                 = (NEW.status IN ('succeeded','failed','skipped','cancelled'))""",
    "step_result_if_succeeded": "(NEW.result IS NOT NULL) = (NEW.status = 'succeeded')",
    "ready_is_due": "NEW.status <> 'ready' OR (NEW.run_at IS NOT NULL AND NEW.wake_at IS NOT NULL)",
    "step_counts": "NEW.attempt >= 0 AND NEW.retries >= 0 AND NEW.preemptions >= 0 AND NEW.waiting >= 0",
    "compensation_has_step": "(NEW.kind = 'compensation') = (NEW.compensates IS NOT NULL)",
    "rank_of_compensation": "NEW.rank IS NULL OR (NEW.kind = 'compensation' AND NEW.rank >= 1)",
    "step_mark_known": "NEW.mark IS NULL OR NEW.mark IN ('pivot','retriable')",
    "limit_has_key": "(NEW.limit_name IS NULL) = (NEW.limit_key IS NULL)",
    "place_is_used": """NEW.limit_slot IS NULL
                        OR (NEW.limit_name IS NOT NULL AND NEW.status IN ('ready','running'))""",
}


#: When somebody is to look at a step that has time-outs: kept here, for a step is made ready, and is claimed, in many
#: ways.  A step without any pays for one look at its options.  ``start_by`` is kept while a claim puts the step off,
#: and is set anew when a pause is over.  What runs is looked at again later by whoever finds a sign of life.
SET_TIMEOUT = """
    IF strpos(NEW.options, '"byrd_timeouts"') > 0 OR NEW.timeout_at IS NOT NULL THEN
        timeouts := NEW.options::json -> 'byrd_timeouts';
        IF NEW.status = 'ready' AND NEW.wake_at < 'infinity' THEN
            IF TG_OP = 'INSERT' OR NEW.ready_at IS DISTINCT FROM OLD.ready_at OR OLD.wake_at = 'infinity'
               OR NEW.signal IS NOT NULL AND NEW.run_at IS DISTINCT FROM OLD.run_at THEN
                NEW.start_by := greatest(clock_timestamp(), NEW.run_at)
                              + (timeouts ->> 'schedule_to_start')::float8 * interval '1 second';
            END IF;
            NEW.timeout_at := NEW.start_by;
        ELSIF NEW.status = 'running' THEN
            IF TG_OP = 'INSERT' OR OLD.status <> 'running' THEN
                NEW.timeout_at := NEW.started_at + interval '1 second'
                    * least((timeouts ->> 'start_to_close')::float8, (timeouts ->> 'heartbeat')::float8);
            END IF;
        ELSE
            NEW.timeout_at := NULL;
        END IF;
    END IF;
"""


def trigger_of(table: str, rules: Mapping[str, str], *, before: str = "") -> str:
    """Return the statements that have a table refuse rows that break a rule.  As in a CHECK, an unknown breaks none.

    ``before``: what is done to a row first.
    """
    together = "\n       AND ".join(f"({rule})" for rule in rules.values())
    each = "\n".join(f"        WHEN ({rule}) IS FALSE THEN broken := '{name}';" for name, rule in rules.items())
    return f"""
CREATE FUNCTION byrd.refuse_illegal_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    broken text; timeouts json;
BEGIN{before}
    IF ({together}) IS NOT FALSE THEN
        RETURN NEW;
    END IF;
    CASE
{each}
    END CASE;
    RAISE EXCEPTION 'new row for relation "{table}" violates rule "%"', broken
      USING ERRCODE = 'check_violation', SCHEMA = 'byrd', TABLE = '{table}', CONSTRAINT = broken;
END $$;
CREATE TRIGGER legal_{table} BEFORE INSERT OR UPDATE ON byrd.{table}
    FOR EACH ROW EXECUTE FUNCTION byrd.refuse_illegal_{table}()
"""
