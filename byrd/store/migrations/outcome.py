"""The function ``byrd.outcome`` of schema version 0001: what a client that waits for a value asks again and again.

It is a function for the sake of its plan, which its connection keeps: to plan took longer than all else.  The choices
are fixed for the reason that :mod:`byrd.store.migrations.work` gives.
"""

from __future__ import annotations

#: ``number``: of which step; NULL is the one with the run's value.
OUTCOME = r"""
CREATE FUNCTION byrd.outcome(run uuid, number int)
RETURNS TABLE (no int, status text, result text, error text, run_status text, ignored boolean)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.no, s.status, s.result, coalesce(s.error, c.error, r.error), r.status,
               coalesce((s.options::json->>'ignore_result')::bool, false)
          FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id AND s.no = coalesce(number, r.output)
          LEFT JOIN byrd.steps c ON c.run_id = s.run_id AND c.no = s.cause
         WHERE r.id = run;
END $$
"""
