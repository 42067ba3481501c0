"""The floor: what the same bookkeeping costs in bare SQL, one statement and one commit a step.

One PL/pgSQL function completes a step and claims the next one of its chain, or of another run if it was the last.
There is no broker, no Celery, no time limit, retry or history; only the fence is there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import psycopg2

from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Peer, Shape

#: Between two looks for work, when there is none, in seconds.
_PAUSE_SECONDS = 0.002
_WAIT_SECONDS = 120.0

_TABLES = """
CREATE SCHEMA floor;
CREATE TABLE floor.runs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, result text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(), finished_at timestamptz);
CREATE TABLE floor.steps (
    run_id bigint NOT NULL, no int NOT NULL, status text NOT NULL, attempt int NOT NULL DEFAULT 0,
    input text, result text, started_at timestamptz, finished_at timestamptz, PRIMARY KEY (run_id, no)
) WITH (fillfactor = 80);
CREATE INDEX ready ON floor.steps (run_id) WHERE status = 'ready';

CREATE FUNCTION floor.submit(p_size int, p_values text[]) RETURNS SETOF bigint LANGUAGE sql AS $$
    WITH new AS (
        INSERT INTO floor.runs (result) SELECT NULL FROM generate_subscripts(p_values, 1) RETURNING id
    ), numbered AS (SELECT id, row_number() OVER (ORDER BY id) AS n FROM new
    ), made AS (
        INSERT INTO floor.steps (run_id, no, status, input)
        SELECT id, no, CASE no WHEN 0 THEN 'ready' ELSE 'pending' END, CASE no WHEN 0 THEN p_values[n] END
          FROM numbered, generate_series(0, p_size - 1) no
    ) SELECT id FROM numbered ORDER BY n
$$;

CREATE FUNCTION floor.advance(
    INOUT p_run bigint, INOUT p_no int, INOUT p_attempt int, INOUT p_value text
) LANGUAGE plpgsql AS $$
BEGIN
    IF p_run IS NOT NULL THEN
        UPDATE floor.steps SET status = 'done', result = p_value, finished_at = clock_timestamp()
         WHERE run_id = p_run AND no = p_no AND status = 'running' AND attempt = p_attempt;
        IF NOT FOUND THEN
            RAISE 'step % of run % was taken away', p_no, p_run;
        END IF;
        UPDATE floor.steps SET status = 'running', attempt = attempt + 1, input = p_value,
               started_at = clock_timestamp()
         WHERE run_id = p_run AND no = p_no + 1 AND status = 'pending' RETURNING attempt INTO p_attempt;
        IF FOUND THEN
            p_no := p_no + 1;
            RETURN;
        END IF;
        UPDATE floor.runs SET result = p_value, finished_at = clock_timestamp() WHERE id = p_run;
    END IF;
    p_run := NULL;
    UPDATE floor.steps SET status = 'running', attempt = attempt + 1, started_at = clock_timestamp()
     WHERE (run_id, no) = (SELECT run_id, no FROM floor.steps WHERE status = 'ready'
                            ORDER BY run_id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING run_id, no, attempt, input INTO p_run, p_no, p_attempt, p_value;
END
$$;
"""


class FloorPeer(Peer):
    """Bare SQL; its workers are processes with one connection each."""

    shapes = frozenset({"one", "chain"})
    modes = frozenset({"one", "batch"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._connection = psycopg2.connect(config.postgres_url)
        self._connection.autocommit = True
        self._cursor = self._connection.cursor()
        self._since = 0

    @property
    def version(self) -> str:
        """Say what runs it."""
        return f"psycopg2 {psycopg2.__version__.split()[0]}"

    def prepare(self) -> None:
        """Make the tables and the functions."""
        self._cursor.execute(_TABLES)
        # As beside what has ended before: the plans that are made for empty tables would be kept, and read them whole.
        self._cursor.execute(
            "INSERT INTO floor.steps (run_id, no, status) SELECT -n, 0, 'done' FROM generate_series(1, 20000) n"
        )
        self._cursor.execute("ANALYZE floor.steps")

    def launch(self, processes: int) -> None:
        """Start the processes."""
        for _ in range(processes):
            self.spawn("-m", "benchmarks.peers.floor", "worker")

    def submit(self, shape: Shape, number: int) -> int:
        """Insert a run and its steps."""
        return self._submit(shape, [number])[0]

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Insert all in one statement."""
        return self._submit(shape, numbers)

    def _submit(self, shape: Shape, numbers: Sequence[int]) -> list[int]:
        values = [str(number) for number in numbers]
        self._cursor.execute("SELECT * FROM floor.submit(%s, %s)", (shape.size, values))
        return [int(run) for (run,) in self._cursor.fetchall()]

    def reset(self, shape: Shape) -> None:
        """Count the runs that are made from now on."""
        self._cursor.execute("SELECT coalesce(max(id), 0) FROM floor.runs")
        [[self._since]] = self._cursor.fetchall()

    def ended(self) -> int:
        """Count the runs that have ended."""
        self._cursor.execute(
            "SELECT count(*) FROM floor.runs WHERE id > %s AND finished_at IS NOT NULL", (self._since,)
        )
        [[ended]] = self._cursor.fetchall()
        return int(ended)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Ask each millisecond."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            self._cursor.execute("SELECT result FROM floor.runs WHERE id = %s AND finished_at IS NOT NULL", (handle,))
            if found := self._cursor.fetchall():
                return int(found[0][0])
            time.sleep(0.001)
        raise TimeoutError(f"run {handle} has not ended")

    def end_times(self, handles: Sequence[Any]) -> list[float] | None:
        """Return when the runs ended."""
        self._cursor.execute(
            "SELECT id, extract(epoch FROM finished_at)::float FROM floor.runs WHERE id > %s", (self._since,)
        )
        found = dict(self._cursor.fetchall())
        return [found[handle] for handle in handles]


def work(config: Config) -> None:
    """Run steps until the process is ended."""
    connection = psycopg2.connect(config.postgres_url)
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("PREPARE advance AS SELECT * FROM floor.advance($1, $2, $3, $4)")
    run, no, attempt, value = None, None, None, None
    while True:
        cursor.execute("EXECUTE advance (%s, %s, %s, %s)", (run, no, attempt, value))
        [(run, no, attempt, value)] = cursor.fetchall()
        if run is None:
            no = attempt = value = None
            time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(FloorPeer, work)
