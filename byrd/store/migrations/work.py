"""The function ``byrd.work`` of schema version 0001: the one statement in which a slice records and claims.

A later version of it gets a name of its own, for workers of both versions run side by side during an upgrade.

Locks are taken in the order of :mod:`byrd.store.locks`, run after run: the worker and the runs (shared), the steps, and
then, for one run after the other, its joins from the inside out; at last the rows of the runs that may be over.
It refuses members of two joins of one run: the joins would be taken in an order of their own, and of a run whose last
join ends by both, the first would say that it waits for the other.

The planner's choices are fixed, for these plans live as long as their connection: made while the tables are small, a
sequential scan would stay when they are large.  For the same reason ``status || ''`` stands wherever a row is found by
its key: an index of statuses, which looks small then, must not come in question.
"""

from __future__ import annotations

#: SQLSTATE of "this is not for the fast path": nothing was changed, and the transitions are to be made one by one.
UNUSUAL = "BY001"

WORK = r"""
CREATE FUNCTION byrd.work(
    me uuid, child int, token uuid,
    done_ids text[], done_attempts int[], done_results text[], done_runs uuid[],
    own_id text, own_attempt int, own_task text,
    most int, others boolean, peek boolean)
RETURNS TABLE (
    what text, id text, run_id uuid, no int, kind text, task text, queue text, attempt int, retries int,
    preemptions int, args text, kwargs text, options text, group_id text, join_no int, join_pos int,
    parent_id text, input_no int, input text)
LANGUAGE plpgsql VOLATILE
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    my_queues text[]; my_tasks text[]; a_queue text;
    claimed int := 0; found_rows int;
    all_runs uuid[]; f_runs uuid[]; f_nos int[]; f_joins int[];
    n_runs uuid[]; n_nos int[];
    going uuid[] := '{}'; ended uuid[] := '{}'; ready_ids text[] := '{}'; some_ready text[]; some_runs uuid[];
    unusual boolean; uncalled boolean; next_ids text[]; mine_ids text[]; maybe_over uuid[];
    a_run uuid; last_run uuid; a_join int; a_count int; left_over int; a_kind text; a_status text;
    own_left boolean; of_step boolean;
BEGIN
    -- A worker is not given up between this check and the commit, or nobody would ever recover what is claimed here.
    -- To lock its row is to write it: a look that finds nothing would have a commit of its own.  An advisory lock
    -- needs no transaction id.
    IF most > 0 OR peek THEN
        PERFORM pg_advisory_xact_lock_shared(1652126310, hashtext(me::text));
        SELECT w.queues, w.shares INTO my_queues, my_tasks FROM byrd.workers w
         WHERE w.id = me AND w.lease_until > clock_timestamp() AND NOT w.stopping;
    END IF;
    my_tasks := coalesce(my_tasks, '{}');
    my_queues := coalesce(my_queues, '{}');

    IF cardinality(done_ids) > 0 THEN
        FOREACH a_run IN ARRAY done_runs LOOP
            PERFORM pg_advisory_xact_lock_shared(1652126308, hashtext(a_run::text));
        END LOOP;
        WITH done AS (
            UPDATE byrd.steps s
               SET status = 'succeeded', result = done_results[array_position(done_ids, s.id)],
                   worker_id = NULL, pid = NULL, claim = NULL,
                   finished_at = greatest(clock_timestamp(), (SELECT p.finished_at + interval '1 microsecond'
                       FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after))
             WHERE s.id = ANY(done_ids) AND s.attempt = done_attempts[array_position(done_ids, s.id)]
               AND s.status || '' = 'running'
            RETURNING s.run_id, s.no, s.join_no, s.kind, s.saga, s.mark)
        SELECT array_agg(run_id), array_agg(no), CASE WHEN bool_or(join_no IS NOT NULL) THEN array_agg(join_no) END,
               bool_or(kind IN ('item','compensation') OR saga IS NOT NULL OR mark IS NOT NULL)
          INTO f_runs, f_nos, f_joins, unusual FROM done;
        IF unusual THEN
            RAISE EXCEPTION 'not for the fast path' USING ERRCODE = 'BY001';
        END IF;
        all_runs := f_runs;
    END IF;

    WHILE f_runs IS NOT NULL LOOP
        -- What comes next: claimed here when it may be, made ready otherwise.
        SELECT bool_or(k.kind NOT IN ('task','callback')), array_agg(k.id), array_agg(k.id) FILTER (WHERE k.mine)
          INTO unusual, next_ids, mine_ids
          FROM (SELECT n.id, n.kind, n.fits AND claimed + row_number() OVER (ORDER BY NOT n.fits) <= most AS mine
                  FROM unnest(f_runs, f_nos) AS f (run_id, no),
                       LATERAL (SELECT x.id, x.kind,
                                       x.kind IN ('task','callback') AND NOT x.solo AND x.countdown IS NULL
                                         AND x.eta IS NULL AND x.preemptions = 0 AND x.task = ANY(my_tasks)
                                         AND x.queue = ANY(my_queues)
                                         AND (SELECT r.status FROM byrd.runs r WHERE r.id = x.run_id) = 'running'
                                         AS fits
                                  FROM byrd.steps x
                                 WHERE x.run_id = f.run_id AND x.after = f.no AND x.status || '' = 'pending'
                                   AND NOT x.on_failure AND NOT x.replaced
                                   AND (x.kind NOT IN ('join','saga') OR x.waiting = 0)
                                OFFSET 0) n) k;
        IF unusual THEN
            RAISE EXCEPTION 'not for the fast path' USING ERRCODE = 'BY001';
        END IF;
        IF next_ids IS NOT NULL THEN
            mine_ids := coalesce(mine_ids, '{}');
            -- NOT solo, again: of a revoke that commits while this waits for the row, nothing else is seen.
            WITH released AS (
                UPDATE byrd.steps s
                   SET status = CASE WHEN s.id = ANY(mine_ids) AND NOT s.solo THEN 'running' ELSE 'ready' END,
                       attempt = s.attempt + (s.id = ANY(mine_ids) AND NOT s.solo)::int,
                       started_at = CASE WHEN s.id = ANY(mine_ids) AND NOT s.solo THEN clock_timestamp() END,
                       worker_id = CASE WHEN s.id = ANY(mine_ids) AND NOT s.solo THEN me END,
                       pid = CASE WHEN s.id = ANY(mine_ids) AND NOT s.solo THEN child END,
                       claim = CASE WHEN s.id = ANY(mine_ids) AND NOT s.solo THEN token END,
                       ready_at = clock_timestamp(),
                       run_at = coalesce(s.eta, clock_timestamp() + coalesce(s.countdown, 0) * interval '1 second'),
                       wake_at = CASE WHEN coalesce(s.eta <= clock_timestamp(), coalesce(s.countdown, 0) <= 0)
                         THEN clock_timestamp() + interval '2 seconds'
                         ELSE coalesce(s.eta, clock_timestamp() + s.countdown * interval '1 second') END,
                       sends = CASE WHEN coalesce(s.eta <= clock_timestamp(), coalesce(s.countdown, 0) <= 0)
                         THEN 1 ELSE 0 END,
                       expires_at = coalesce(clock_timestamp() + s.expires_in * interval '1 second', s.expires_at)
                 WHERE s.id = ANY(next_ids) AND s.status || '' = 'pending'
                RETURNING s.id, s.run_id, s.status = 'running' AS mine)
            SELECT count(*) FILTER (WHERE l.mine), array_agg(l.id) FILTER (WHERE NOT l.mine), array_agg(l.run_id)
              INTO found_rows, some_ready, some_runs FROM released l;
            claimed := claimed + found_rows;
            ready_ids := ready_ids || coalesce(some_ready, '{}');
            going := going || coalesce(some_runs, '{}');
        END IF;

        n_runs := NULL; n_nos := NULL;
        EXIT WHEN f_joins IS NULL;
        FOR a_run, a_join, a_count IN
            SELECT f.run_id, f.join_no, count(*) FROM unnest(f_runs, f_joins) AS f (run_id, join_no)
             WHERE f.join_no IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2
        LOOP
            IF a_run = last_run THEN
                RAISE EXCEPTION 'not for the fast path' USING ERRCODE = 'BY001';
            END IF;
            last_run := a_run;
            WHILE a_join IS NOT NULL LOOP
                UPDATE byrd.steps s SET waiting = s.waiting - a_count
                 WHERE s.run_id = a_run AND s.no = a_join AND s.status || '' = 'pending'
                RETURNING s.waiting, s.kind INTO left_over, a_kind;
                EXIT WHEN NOT FOUND;  -- the join was cancelled with its run, so this may be the run's last step
                IF left_over > 0 THEN
                    going := going || a_run;
                    EXIT;
                END IF;
                IF EXISTS (SELECT 1 FROM byrd.steps m WHERE m.run_id = a_run AND m.join_no = a_join
                              AND m.status <> 'succeeded') THEN
                    RAISE EXCEPTION 'not for the fast path' USING ERRCODE = 'BY001';
                END IF;
                n_runs := n_runs || a_run; n_nos := n_nos || a_join;
                UPDATE byrd.steps s SET status = 'succeeded', (finished_at, result) =
                   (SELECT greatest(clock_timestamp(), (SELECT p.finished_at + interval '1 microsecond'
                             FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after), max(m.finished_at)),
                           CASE WHEN a_kind = 'join'
                             THEN '[' || coalesce(string_agg(m.result, ',' ORDER BY m.join_pos), '') || ']'
                             ELSE max(m.result) END
                      FROM byrd.steps m WHERE m.run_id = a_run AND m.join_no = a_join)
                 WHERE s.run_id = a_run AND s.no = a_join AND s.status || '' = 'pending'
                RETURNING s.join_no INTO a_join;
                a_count := 1;
            END LOOP;
        END LOOP;
        f_runs := n_runs; f_nos := n_nos; f_joins := NULL;
    END LOOP;

    -- Runs that may be over.  Their rows first, so that of two last steps that end at once the second sees the first.
    IF all_runs IS NOT NULL AND (cardinality(all_runs) > 1 OR cardinality(going) = 0) THEN
        maybe_over := ARRAY(SELECT DISTINCT a FROM unnest(all_runs) a WHERE a <> ALL (going));
        FOR a_run, a_status IN
            SELECT r.id, r.status FROM byrd.runs r WHERE r.id = ANY(maybe_over) ORDER BY r.id FOR NO KEY UPDATE
        LOOP
            CONTINUE WHEN EXISTS (SELECT 1 FROM byrd.steps s
                                   WHERE s.run_id = a_run AND s.status IN ('ready','running','waiting'));
            uncalled := EXISTS (SELECT 1 FROM byrd.steps s WHERE s.run_id = a_run AND s.status = 'pending');
            IF uncalled THEN
                CONTINUE WHEN EXISTS (
                    WITH RECURSIVE below AS (
                        SELECT s.no FROM byrd.steps s WHERE s.run_id = a_run AND s.status = 'pending' AND s.on_failure
                        UNION
                        SELECT s.no FROM byrd.steps s JOIN below u ON s.after = u.no
                         WHERE s.run_id = a_run AND s.status = 'pending')
                    SELECT 1 FROM byrd.steps s WHERE s.run_id = a_run AND s.status = 'pending'
                       AND s.no NOT IN (SELECT u.no FROM below u));
            END IF;
            IF a_status NOT IN ('running','paused') OR EXISTS (
                SELECT 1 FROM byrd.steps s WHERE s.run_id = a_run AND s.kind IN ('task','join','wait','saga','callback')
                   AND s.status IN ('failed','skipped','cancelled')) THEN
                RAISE EXCEPTION 'not for the fast path' USING ERRCODE = 'BY001';
            END IF;
            IF uncalled THEN  -- only now, for the groups of errbacks that nobody has called are no failures
                UPDATE byrd.steps s SET status = 'skipped', finished_at = clock_timestamp()
                 WHERE s.run_id = a_run AND s.status = 'pending';
            END IF;
            ended := ended || a_run;
        END LOOP;
    END IF;
    IF cardinality(ended) > 0 THEN
        WITH over AS (
            UPDATE byrd.runs r SET status = 'succeeded', finished_at = clock_timestamp() WHERE r.id = ANY(ended)
            RETURNING r.parent_step)
        SELECT bool_or(parent_step IS NOT NULL) INTO of_step FROM over;
        IF of_step THEN
            NOTIFY byrd;
        END IF;
        INSERT INTO byrd.events (run_id, event) SELECT e, 'succeeded' FROM unnest(ended) e;
    END IF;

    -- The step that the message names.
    own_left := own_id IS NOT NULL;
    IF own_left AND claimed < most THEN
        UPDATE byrd.steps s
           SET status = 'running', attempt = s.attempt + 1, started_at = clock_timestamp(), worker_id = me,
               pid = child, claim = token
         WHERE s.id = own_id AND s.status || '' = 'ready' AND s.attempt = own_attempt AND NOT s.solo
           AND s.wake_at < 'infinity' AND s.run_at <= clock_timestamp() AND s.preemptions = 0
           AND s.task = own_task AND s.task = ANY(my_tasks)
           AND (SELECT r.status FROM byrd.runs r WHERE r.id = s.run_id) = 'running';
        GET DIAGNOSTICS found_rows = ROW_COUNT;
        claimed := claimed + found_rows;
        own_left := found_rows = 0;
    END IF;

    -- Other ready steps of this worker's queues, whoever was told of them.
    IF others THEN
        IF cardinality(my_queues) > 1 THEN  -- none comes always first
            my_queues := ARRAY(SELECT q FROM unnest(my_queues) q ORDER BY random());
        END IF;
        FOREACH a_queue IN ARRAY my_queues LOOP
            EXIT WHEN claimed >= most;
            -- First their ids: a LIMIT in the FROM of an UPDATE may be taken again for each of its rows.
            SELECT array_agg(c.id) INTO mine_ids
              FROM (SELECT d.id FROM byrd.steps d
                     WHERE d.status = 'ready' AND d.sends > 0 AND NOT d.solo AND d.queue = a_queue
                       AND d.wake_at < 'infinity' AND d.run_at <= clock_timestamp() AND d.preemptions = 0
                       AND d.task = ANY(my_tasks)
                       AND (SELECT r.status FROM byrd.runs r WHERE r.id = d.run_id) = 'running'
                     ORDER BY d.wake_at LIMIT most - claimed FOR UPDATE OF d SKIP LOCKED) c;
            CONTINUE WHEN mine_ids IS NULL;
            UPDATE byrd.steps s
               SET status = 'running', attempt = s.attempt + 1, started_at = clock_timestamp(), worker_id = me,
                   pid = child, claim = token
             WHERE s.id = ANY(mine_ids) AND s.status || '' = 'ready';
            GET DIAGNOSTICS found_rows = ROW_COUNT;
            claimed := claimed + found_rows;
        END LOOP;
    END IF;

    -- As a slice begins, or takes what is offered, its process runs nothing.  What it is said to run was claimed by a
    -- call whose answer was lost.
    RETURN QUERY
        SELECT 'claim', s.id, s.run_id, s.no, s.kind, s.task, s.queue, s.attempt, s.retries, s.preemptions, s.args,
               s.kwargs, s.options, s.group_id, s.join_no, s.join_pos,
               (SELECT p.id FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after), s.input,
               (SELECT i.result FROM byrd.steps i WHERE i.run_id = s.run_id AND i.no = s.input)
          FROM byrd.steps s
         WHERE s.worker_id = me AND s.status = 'running'
           AND (s.claim = token OR (own_id IS NOT NULL AND s.pid = child AND NOT s.solo))
         ORDER BY s.id IS DISTINCT FROM own_id, s.wake_at;
    IF cardinality(ready_ids) > 0 THEN
        RETURN QUERY
            SELECT 'ready', s.id, s.run_id, s.no, s.kind, s.task, s.queue, s.attempt, s.retries,
                   (s.run_at <= clock_timestamp())::int,
                   CASE WHEN s.limit_key IS NOT NULL THEN 'limited' WHEN s.solo THEN 'solo' END, NULL, s.options,
                   s.group_id, NULL::int, s.join_pos,
                   (SELECT p.id FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after), NULL::int, NULL
              FROM byrd.steps s WHERE s.id = ANY(ready_ids);
    END IF;
    -- There may be more than this process takes, or it takes no others: of each queue, one ready step for somebody else
    -- to begin with.  A slice is begun there anyway by the message of a step that became ready here, if it is due, not
    -- solo, and shared.  From here on, my_queues are those without one.
    IF peek AND (claimed >= most OR NOT others) THEN
        IF cardinality(ready_ids) > 0 THEN
            SELECT ARRAY(SELECT q FROM unnest(my_queues) q
                          WHERE NOT EXISTS (SELECT FROM byrd.steps s
                                             WHERE s.id = ANY(ready_ids) AND s.queue = q AND NOT s.solo
                                               AND s.run_at <= clock_timestamp() AND s.task = ANY(my_tasks)))
              INTO my_queues;
        END IF;
        RETURN QUERY
            SELECT 'ready', s.id, s.run_id, s.no, s.kind, s.task, s.queue, s.attempt, s.retries, 1, NULL, NULL,
                   s.options, s.group_id, NULL::int, s.join_pos,
                   (SELECT p.id FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after), NULL::int, NULL
              FROM unnest(my_queues) q, LATERAL
                   (SELECT * FROM byrd.steps d WHERE d.status = 'ready' AND d.sends > 0 AND NOT d.solo AND d.queue = q
                       AND d.wake_at < 'infinity' AND d.run_at <= clock_timestamp() AND d.preemptions = 0
                       AND d.task = ANY(my_tasks)
                     ORDER BY d.wake_at LIMIT 1 FOR UPDATE OF d SKIP LOCKED) s;
    END IF;
    IF coalesce(cardinality(all_runs), 0) < cardinality(done_ids) THEN
        RETURN QUERY
            SELECT 'stale', d.id, NULL::uuid, NULL::int, s.status, NULL, NULL, s.attempt, NULL::int, NULL::int, NULL,
                   NULL, NULL, NULL, NULL::int, NULL::int, NULL, NULL::int, NULL
              FROM unnest(done_ids, done_attempts) AS d (id, attempt) LEFT JOIN byrd.steps s ON s.id = d.id
             WHERE (s.status = 'succeeded' AND s.attempt = d.attempt) IS NOT TRUE;
    END IF;
    IF own_left THEN
        RETURN QUERY
            SELECT 'left', s.id, NULL::uuid, NULL::int, s.status, NULL, NULL, s.attempt, NULL::int, NULL::int, NULL,
                   NULL, NULL, NULL, NULL::int, NULL::int, NULL, NULL::int, NULL
              FROM byrd.steps s
             WHERE s.id = own_id AND s.status || '' = 'ready' AND s.attempt = own_attempt;
    END IF;
END $$
"""
