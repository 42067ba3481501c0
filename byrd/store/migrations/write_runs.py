"""The functions ``byrd.write_runs`` and ``byrd.write_run`` of schema version 0001: runs and their steps.

Each is one statement.  A later version of one of them gets a name of its own, for clients of both versions run side by
side during an upgrade.
"""

from __future__ import annotations

#: Each array of steps may be NULL, for the column's default.  ``told``: whoever calls it publishes what is ready.
WRITE_RUNS = r"""
CREATE FUNCTION byrd.write_runs(
    run_ids uuid[], workflows text[], titles text[], keys text[], run_args text[], outputs int[], deadlines float8[],
    parents text[], step_runs uuid[], ids text[], nos int[], kinds text[], tasks text[], queues text[],
    step_args text[], step_kwargs text[], options text[], compensations text[], afters int[], on_failures bool[],
    inputs int[], join_nos int[], join_poss int[], waitings int[], group_ids text[], countdowns float8[],
    etas timestamptz[], expires_ins float8[], expires_ats timestamptz[], solos bool[],
    signals text[], signal_ofs text[], fallbacks text[], limit_names text[], limit_keys text[], sagas int[],
    marks text[], told boolean)
RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    written uuid[]; all_written boolean;
BEGIN
    WITH fresh AS (
        INSERT INTO byrd.runs (id, workflow, title, key, args, output, parent_step, deadline)
        SELECT r.id, r.workflow, r.title, r.key, r.args, r.output, r.parent_step,
               clock_timestamp() + r.deadline * interval '1 second'
          FROM unnest(run_ids, workflows, titles, keys, run_args, outputs, parents, deadlines)
               AS r (id, workflow, title, key, args, output, parent_step, deadline)
         ORDER BY r.workflow, r.key  -- of two that write the same keys, neither waits for the other
        ON CONFLICT DO NOTHING RETURNING id)
    SELECT array_agg(id) INTO written FROM fresh;
    all_written := coalesce(cardinality(written), 0) = cardinality(run_ids);

    INSERT INTO byrd.steps (run_id, id, no, kind, task, queue, args, kwargs, options, compensation, after, on_failure,
                            input, join_no, join_pos, waiting, group_id, countdown, eta, expires_in, expires_at, solo,
                            signal, signal_of, fallback, limit_name, limit_key, saga, mark, status, ready_at, run_at,
                            wake_at, sends)
    SELECT s.run_id, s.id, s.no, coalesce(s.kind, 'task'), s.task, s.queue, coalesce(s.args, '[]'),
           coalesce(s.kwargs, '{}'), coalesce(s.options, '{}'), s.compensation, s.after, coalesce(s.on_failure, false),
           s.input, s.join_no, s.join_pos, coalesce(s.waiting, 0), s.group_id, s.countdown, s.eta, s.expires_in,
           CASE WHEN f.first THEN coalesce(f.now + s.expires_in * interval '1 second', s.expires_at)
                ELSE s.expires_at END,
           coalesce(s.solo, false), s.signal, s.signal_of, s.fallback, s.limit_name, s.limit_key, s.saga, s.mark,
           CASE WHEN f.first THEN 'ready' ELSE 'pending' END,
           CASE WHEN f.first THEN f.now END, CASE WHEN f.first THEN f.run_at END,
           CASE WHEN f.first THEN CASE WHEN told AND f.run_at <= f.now THEN f.now + interval '2 seconds'
                                       ELSE f.run_at END END,
           CASE WHEN f.first AND told AND f.run_at <= f.now THEN 1 ELSE 0 END
      FROM unnest(step_runs, ids, nos, kinds, tasks, queues, step_args, step_kwargs, options, compensations, afters,
                  on_failures, inputs, join_nos, join_poss, waitings, group_ids, countdowns, etas, expires_ins,
                  expires_ats, solos, signals, signal_ofs, fallbacks, limit_names, limit_keys, sagas, marks)
           AS s (run_id, id, no, kind, task, queue, args, kwargs, options, compensation, after, on_failure, input,
                 join_no, join_pos, waiting, group_id, countdown, eta, expires_in, expires_at, solo, signal, signal_of,
                 fallback, limit_name, limit_key, saga, mark),
           LATERAL (SELECT s.after IS NULL AND coalesce(s.kind, 'task') NOT IN ('join','saga') AS first, n.now,
                           coalesce(s.eta, n.now + coalesce(s.countdown, 0) * interval '1 second') AS run_at
                      FROM (SELECT clock_timestamp() AS now) n) f
     WHERE all_written OR s.run_id = ANY (written);

    INSERT INTO byrd.events (run_id, event, detail)
    SELECT w, 'submitted', '{"steps": ' || count(*) || '}'
      FROM unnest(step_runs) w WHERE all_written OR w = ANY (written) GROUP BY w;

    IF NOT all_written THEN
        RETURN QUERY SELECT r FROM unnest(run_ids) r WHERE written IS NULL OR r <> ALL (written);
    END IF;
END $$
"""

#: One run that is a single step which may start at once: as ``write_runs``, in half of the time.  False: it is there.
WRITE_RUN = r"""
CREATE FUNCTION byrd.write_run(
    run uuid, flow text, heading text, its_key text, call text, seconds float8, parent text,
    step text, its_task text, its_queue text, its_args text, its_kwargs text, its_options text, alone boolean,
    told boolean)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    now timestamptz;
BEGIN
    INSERT INTO byrd.runs (id, workflow, title, key, args, output, parent_step, deadline)
    VALUES (run, flow, heading, its_key, call, 0, parent, clock_timestamp() + seconds * interval '1 second')
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    now := clock_timestamp();  -- it may have waited for another one with its key
    INSERT INTO byrd.steps (run_id, id, no, kind, task, queue, args, kwargs, options, solo,
                            status, ready_at, run_at, wake_at, sends)
    VALUES (run, step, 0, 'task', its_task, its_queue, its_args, its_kwargs, its_options, alone,
            'ready', now, now, CASE WHEN told THEN now + interval '2 seconds' ELSE now END, told::int);
    INSERT INTO byrd.events (run_id, event, detail) VALUES (run, 'submitted', '{"steps": 1}');
    RETURN true;
END $$
"""
