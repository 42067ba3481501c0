"""``docs/states.md`` says what the tables of transitions say; ``python -m tests.store.test_states_doc`` writes it."""

from __future__ import annotations

from pathlib import Path

from byrd.model import RUN_TRANSITIONS, STEP_TRANSITIONS, RunStatus, StepStatus, Transition, state_diagram

DOC = Path(__file__).parents[2] / "docs" / "states.md"

_HEAD = """# States of runs and steps

Every change of a status is one guarded statement in `byrd.store`: it names the states from which it may start, and
tells its caller when the row was in none of them. The tables below are `byrd.model.RUN_TRANSITIONS` and
`STEP_TRANSITIONS`; the database's CHECK constraints list the same statuses. `tests/store/test_transitions.py` tries
each transition from every state, and this page is generated from the tables
(`python -m tests.store.test_states_doc`).
"""

_RUN = """A run is `running` from the moment when it is submitted. It ends as `succeeded`, `failed` or `cancelled`;
only a retry, or a rollback that an operator asks for, leaves these. A run whose completed saga steps are being undone
is `compensating`, and `rollback_stuck` when a compensation used up its retries, its own or that of a saga in it: then
it waits for an operator.
"""

_STEP = """A step is `pending` until what it comes after is done, then `ready`: a worker may claim it. Each claim raises
the attempt number, and only the attempt that claimed last may write. A claim that the limit of the step's task does not
allow is put off before it is committed: the step is `ready` for later, and has its number back. A group's join is never
`ready` or `running`: it ends by itself with the last member. A sleep, or a step that waits for a signal, is `waiting`
instead until its time or its signal has come; it has no attempts. A saga in a run is `pending` until the canvas inside
it has a value, and `waiting` from when a step in it fails until what it had done is undone. A step that replaced itself
by a canvas is `pending` again until the canvas is done.
"""


def render() -> str:
    """Return the page as the tables have it."""
    parts = [
        _HEAD,
        "## Runs\n",
        _RUN,
        _diagram(RUN_TRANSITIONS, RunStatus.RUNNING),
        _table(RUN_TRANSITIONS),
        "## Steps\n",
        _STEP,
        _diagram(STEP_TRANSITIONS, StepStatus.PENDING),
        _table(STEP_TRANSITIONS),
    ]
    return "\n".join(parts)


def _diagram(transitions: tuple[Transition, ...], initial: str) -> str:
    return f"```mermaid\n{state_diagram(transitions, initial=str(initial))}\n```\n"


def _table(transitions: tuple[Transition, ...]) -> str:
    order = [str(status) for status in (*RunStatus, *StepStatus)]
    lines = ["| transition | from | to | when |", "| --- | --- | --- | --- |"]
    for t in transitions:
        sources, targets = (", ".join(sorted(map(str, s), key=order.index)) for s in (t.sources, t.targets))
        lines.append(f"| `{t.name}` | {sources} | {targets} | {t.why} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_tables_say() -> None:
    assert DOC.read_text() == render(), "write it anew: python -m tests.store.test_states_doc"


if __name__ == "__main__":
    DOC.write_text(render())
