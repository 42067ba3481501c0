"""The functions of schema version 0001 that give a limit's places and tokens to the steps that wait for them.

A step *waits* while it is ready and has a ticket (``limit_no``) but no place (``limit_slot``).  It is given a place,
and the time at which it may start, in the order of the tickets, in which priorities come first; it *holds* the place
until its attempt ends, or until it has not turned up for :data:`LAPSE`.  What is in use is counted in these rows
themselves, so that nothing can leak.
The row of the key in ``limit_keys`` bears the rate (``tat``, the theoretical arrival time of the generic cell rate
algorithm), and is locked while anything of this is decided.  It is locked last: whoever has it waits for nobody, for
other steps are taken with SKIP LOCKED.

A later version of them gets names of its own, for workers of both versions run side by side during an upgrade.
"""

from __future__ import annotations

#: Steps are told so long before when they may start: then few questions serve a high rate, and a limit that is changed
#: is followed within this time.
AHEAD = "interval '1 second'"
#: A step that was told and has not turned up so long after its time loses its place: its message waits in a busy queue.
LAPSE = "interval '10 seconds'"
#: Without an end in sight, a step looks again for itself after this time; somebody is to wake it long before that.
FAR = "interval '1 hour'"

_SETTINGS = "SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off"

#: What a limit is now: as it was declared, unless somebody has set it otherwise.  No rate is 0, no concurrency NULL.
_LIMIT = """SELECT coalesce(x.set_every, x.every) AS every, coalesce(x.set_burst, x.burst) AS burst,
               nullif(coalesce(x.set_concurrency, x.concurrency), -1) AS most
          INTO l FROM byrd.limits x WHERE x.name = the_limit;"""

#: A ticket begins with the step's priority, as the broker understands it: 0, or none, is served first, 9 last.  Numbers
#: of a sequence never reach that far.
_RANK = """CASE WHEN strpos(s.options, '"priority"') > 0
        THEN coalesce((s.options::json ->> 'priority')::bigint, 0) << 56 ELSE 0 END"""

#: Who waits for a place, in order.
_WAITERS = """s.limit_name = the_limit AND s.limit_key = the_key AND s.status = 'ready' AND s.limit_no IS NOT NULL
             AND s.limit_slot IS NULL AND s.wake_at < 'infinity'"""

#: ``told``: what the caller will publish by itself, for the relay need not be called for that: 'none' of the steps,
#: those that are 'due', or 'all'.
GIVE_PLACES = f"""
CREATE FUNCTION byrd.give_places(the_limit text, the_key text, told text) RETURNS int
LANGUAGE plpgsql VOLATILE {_SETTINGS}
AS $$
DECLARE
    k record; l record; a_step text; moment timestamptz; slot timestamptz; arrival timestamptz; due timestamptz;
    tolerance interval; spacing interval; held int; expected int; room float8; given int := 0; waits boolean;
BEGIN
    SELECT x.tat, x.parked_until, x.next_at INTO k FROM byrd.limit_keys x
     WHERE x.name = the_limit AND x.key = the_key FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    {_LIMIT}
    moment := clock_timestamp();
    spacing := l.every * interval '1 second';
    tolerance := spacing * (l.burst - 1);
    arrival := k.tat;
    SELECT count(*), count(*) FILTER (WHERE s.status = 'ready') INTO held, expected FROM byrd.steps s
     WHERE s.limit_name = the_limit AND s.limit_key = the_key AND s.limit_slot IS NOT NULL
       AND (s.status = 'running' OR s.limit_slot > moment - {LAPSE} AND s.wake_at < 'infinity');
    room := least(1000, coalesce(l.most - held, 1000), CASE WHEN l.every > 0
        THEN ceil(extract(epoch FROM {AHEAD}) / l.every) + l.burst - expected ELSE 1000 END);
    IF room > 0 AND coalesce(k.parked_until <= moment + {AHEAD}, true) THEN
        FOR a_step IN SELECT s.id FROM byrd.steps s WHERE {_WAITERS} ORDER BY s.limit_no
                       LIMIT room::int FOR NO KEY UPDATE SKIP LOCKED LOOP
            slot := greatest(moment, arrival - tolerance, k.parked_until);
            EXIT WHEN slot > moment + {AHEAD};
            UPDATE byrd.steps s SET limit_slot = slot, run_at = slot, wake_at = slot, sends = 0 WHERE s.id = a_step;
            arrival := CASE WHEN l.every > 0 THEN greatest(arrival, slot) + spacing ELSE arrival END;
            given := given + 1;
        END LOOP;
    END IF;
    waits := EXISTS (SELECT 1 FROM byrd.steps s WHERE {_WAITERS});
    IF waits THEN  -- somebody has to look again when there may be more to give
        due := greatest(moment, arrival - tolerance, k.parked_until) - {AHEAD} / 2;
        IF l.most - held - given <= 0 THEN  -- who ends an attempt looks, too; this is for steps that do not turn up
            due := greatest(due, moment + {LAPSE});
        END IF;
        due := greatest(due, moment + {AHEAD} / 2);
    END IF;
    IF arrival IS DISTINCT FROM k.tat OR due IS DISTINCT FROM k.next_at THEN
        UPDATE byrd.limit_keys x SET tat = arrival, next_at = due WHERE x.name = the_limit AND x.key = the_key;
    END IF;
    IF told = 'none' AND given > 0 OR told = 'due' AND slot > moment AND given > 0
       OR told <> 'all' AND due IS NOT NULL AND k.next_at IS NULL THEN
        NOTIFY byrd;
    END IF;
    RETURN given;
END $$
"""

#: Decides on a step that was claimed in this very transaction.  Returns whether it may run now; else it is ready again,
#: its attempt's number not used up, and waits for its turn.  NULL: this claim does not hold the step.
ADMIT = f"""
CREATE FUNCTION byrd.admit(a_step text, token uuid, the_limit text, the_key text,
                           its_rate text, its_every float8, its_burst int, its_concurrency int) RETURNS boolean
LANGUAGE plpgsql VOLATILE {_SETTINGS}
AS $$
DECLARE
    mine record; k record; l record; moment timestamptz; arrival timestamptz; expected timestamptz;
    tolerance interval; spacing interval; may boolean; same boolean; held int; running int; ticket bigint;
BEGIN
    SELECT s.limit_name, s.limit_key, s.limit_no, s.limit_slot INTO mine FROM byrd.steps s
     WHERE s.id = a_step AND s.status = 'running' AND s.claim = token FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF mine.limit_slot IS NOT NULL AND mine.limit_no IS NULL THEN
        RETURN true;  -- committed before, and the answer was lost
    END IF;
    LOOP
        {_LIMIT}
        EXIT WHEN FOUND;
        INSERT INTO byrd.limits (name, rate, every, burst, concurrency)
        VALUES (the_limit, its_rate, its_every, its_burst, its_concurrency) ON CONFLICT DO NOTHING;
    END LOOP;
    LOOP
        SELECT x.tat, x.tail, x.parked_until, x.seen_at INTO k FROM byrd.limit_keys x
         WHERE x.name = the_limit AND x.key = the_key FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO byrd.limit_keys (name, key) VALUES (the_limit, the_key) ON CONFLICT DO NOTHING;
    END LOOP;

    moment := clock_timestamp();
    spacing := l.every * interval '1 second';
    tolerance := spacing * (l.burst - 1);
    arrival := k.tat;
    same := coalesce(mine.limit_name = the_limit AND mine.limit_key = the_key, false);
    SELECT count(*), count(*) FILTER (WHERE s.status = 'running') INTO held, running FROM byrd.steps s
     WHERE s.limit_name = the_limit AND s.limit_key = the_key AND s.limit_slot IS NOT NULL AND s.id <> a_step
       AND (s.status = 'running' OR s.limit_slot > moment - {LAPSE} AND s.wake_at < 'infinity');
    may := coalesce(k.parked_until <= moment, true);
    IF may AND same AND coalesce(mine.limit_slot > moment - {LAPSE}, false) THEN
        may := coalesce(running < l.most, true);  -- it was given its place; the limit may be lower since then
    ELSIF may THEN
        may := coalesce(held < l.most, true) AND coalesce(arrival - tolerance <= moment, true)
           AND NOT EXISTS (SELECT 1 FROM byrd.steps s WHERE {_WAITERS}
                              AND s.limit_no < CASE WHEN same AND mine.limit_no IS NOT NULL THEN mine.limit_no
                                                    ELSE 9223372036854775807 END);
        IF may AND l.every > 0 THEN
            arrival := greatest(arrival, moment) + spacing;
        END IF;
    END IF;

    IF may THEN
        UPDATE byrd.steps s SET limit_name = the_limit, limit_key = the_key, limit_slot = moment, limit_no = NULL
         WHERE s.id = a_step;
        IF arrival IS DISTINCT FROM k.tat OR k.seen_at < moment - interval '10 minutes' THEN
            UPDATE byrd.limit_keys x SET tat = arrival, seen_at = CASE
                   WHEN x.seen_at < moment - interval '10 minutes' THEN moment ELSE x.seen_at END
             WHERE x.name = the_limit AND x.key = the_key;
        END IF;
        RETURN true;
    END IF;

    ticket := CASE WHEN same THEN mine.limit_no END;
    expected := CASE WHEN l.every > 0 THEN greatest(moment, arrival - tolerance, k.parked_until, k.tail + spacing)
                     ELSE greatest(moment + {FAR}, k.parked_until) END;
    UPDATE byrd.steps s
       SET status = 'ready', attempt = s.attempt - 1, worker_id = NULL, pid = NULL, claim = NULL, started_at = NULL,
           limit_name = the_limit, limit_key = the_key, limit_slot = NULL,
           limit_no = coalesce(ticket, {_RANK} + nextval('byrd.limit_tickets')),
           sends = 0, run_at = expected, wake_at = expected + {AHEAD} * 5
     WHERE s.id = a_step;
    IF l.every > 0 THEN
        UPDATE byrd.limit_keys x SET tail = expected WHERE x.name = the_limit AND x.key = the_key;
    END IF;
    PERFORM byrd.give_places(the_limit, the_key, 'none');
    RETURN false;
END $$
"""

#: Has ready steps wait that were not claimed yet, in this order, unless there is something to give at once.  Those
#: whose limit nobody has declared yet are left out.
LINE_UP = f"""
CREATE FUNCTION byrd.line_up(ids text[]) RETURNS TABLE (step text, name text, key text)
LANGUAGE plpgsql VOLATILE {_SETTINGS}
AS $$
#variable_conflict use_column
DECLARE
    the_limit text; the_key text; k record; l record; moment timestamptz; expected timestamptz; spacing interval;
    mine text[]; its_ids text[];
BEGIN
    SELECT array_agg(m.id ORDER BY m.place) INTO mine FROM (
        SELECT s.id, i.place FROM unnest(ids) WITH ORDINALITY AS i (id, place) JOIN byrd.steps s ON s.id = i.id
         WHERE s.status || '' = 'ready' AND s.limit_key IS NOT NULL AND s.limit_no IS NULL AND s.limit_slot IS NULL
           AND s.wake_at < 'infinity' AND s.run_at <= clock_timestamp()
           AND EXISTS (SELECT 1 FROM byrd.limits x WHERE x.name = s.limit_name)
           FOR NO KEY UPDATE OF s SKIP LOCKED) m;
    FOR the_limit, the_key, its_ids IN
        SELECT s.limit_name, s.limit_key, array_agg(s.id ORDER BY {_RANK}, i.place)
          FROM unnest(mine) WITH ORDINALITY AS i (id, place) JOIN byrd.steps s ON s.id = i.id
         GROUP BY 1, 2 ORDER BY 1, 2 LOOP
        {_LIMIT}
        LOOP
            SELECT x.tat, x.tail, x.parked_until INTO k FROM byrd.limit_keys x
             WHERE x.name = the_limit AND x.key = the_key FOR UPDATE;
            EXIT WHEN FOUND;
            INSERT INTO byrd.limit_keys (name, key) VALUES (the_limit, the_key) ON CONFLICT DO NOTHING;
        END LOOP;
        moment := clock_timestamp();
        spacing := l.every * interval '1 second';
        expected := CASE WHEN l.every > 0
            THEN greatest(moment, k.tat - spacing * (l.burst - 1), k.parked_until, k.tail + spacing)
            ELSE greatest(moment + {FAR}, k.parked_until) END;
        WITH lined AS MATERIALIZED (
            SELECT i.id, nextval('byrd.limit_tickets') AS ticket, expected + spacing * (i.place - 1) AS due
              FROM unnest(its_ids) WITH ORDINALITY AS i (id, place))
        UPDATE byrd.steps s SET limit_no = {_RANK} + lined.ticket, sends = 0, run_at = lined.due,
               wake_at = lined.due + {AHEAD} * 5
          FROM lined WHERE s.id = lined.id;
        IF l.every > 0 THEN
            UPDATE byrd.limit_keys x SET tail = expected + spacing * (cardinality(its_ids) - 1)
             WHERE x.name = the_limit AND x.key = the_key;
        END IF;
        PERFORM byrd.give_places(the_limit, the_key, 'due');
    END LOOP;
    RETURN QUERY SELECT s.id, s.limit_name, s.limit_key FROM byrd.steps s WHERE s.id = ANY(mine);
END $$
"""

#: Whatever ends an attempt, or a wait for one, gives its place up, and this is what sees it: at the commit, for the key
#: is locked last.
PLACE_FREED = """
CREATE FUNCTION byrd.place_freed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM byrd.give_places(OLD.limit_name, OLD.limit_key, 'none');
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER place_freed AFTER UPDATE ON byrd.steps DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (OLD.limit_slot IS NOT NULL AND NEW.limit_slot IS NULL) EXECUTE FUNCTION byrd.place_freed()
"""
