"""Draws a run: a head with its facts, and its steps as a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from byrd.cli.forest import Forest
from byrd.engine.words import ago, count, error_text, moment, shortened, span
from byrd.items import EACH
from byrd.model import RunStatus, StepKind, StepStatus
from byrd.store import Counts, StepRow
from byrd.store.insight import Snapshot
from byrd.waits import of_whom

#: Symbol and style of each state, of steps and of runs.
SIGNS: Mapping[str, tuple[str, str]] = {
    StepStatus.PENDING: ("·", "dim"),
    StepStatus.READY: ("○", "cyan"),
    StepStatus.RUNNING: ("●", "bold blue"),
    StepStatus.WAITING: ("◷", "cyan"),
    StepStatus.SUCCEEDED: ("✔", "green"),
    StepStatus.FAILED: ("✘", "bold red"),
    StepStatus.SKIPPED: ("–", "dim"),
    StepStatus.CANCELLED: ("⊘", "yellow"),
    RunStatus.PAUSED: ("‖", "yellow"),
    RunStatus.CANCELLING: ("⊘", "yellow"),
    RunStatus.COMPENSATING: ("↶", "magenta"),
    RunStatus.ROLLBACK_STUCK: ("↶", "bold red"),
}
#: A group with more members, or a sequence with more steps, is summarised.
_MANY_MEMBERS, _MANY_STEPS = 20, 40
#: Of each state that is worth a look, this many members of a summarised group are drawn.
_EXAMPLES = 5
_MANY_SUBSTEPS = 8
#: Steps that stand for what is inside them.
_AROUND = (StepKind.JOIN, StepKind.SAGA)


def sign(status: str) -> Text:
    """Return the symbol of a state, in its colour."""
    symbol, style = SIGNS[status]
    return Text(symbol, style=style)


def status_text(status: str) -> Text:
    """Return symbol and name of a state, in its colour."""
    symbol, style = SIGNS[status]
    return Text(f"{symbol} {status.replace('_', ' ')}", style=style)


def drawing(snapshot: Snapshot, *, every: bool = False) -> RenderableType:
    """Draw a run; ``every``: large groups and errbacks that were not called too."""
    return Group(*_head(snapshot), Text(), _Tree(snapshot, every=every).root, *_rollback_note(snapshot))


# -- the head --------------------------------------------------------------------------------------


def _head(snapshot: Snapshot) -> list[RenderableType]:
    run, now = snapshot.run, snapshot.now
    title = Text.assemble(status_text(run.status), "  ", (run.workflow or run.title, "bold"), no_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("run", run.id)
    if run.key:
        facts.add_row("key", Text(run.key))
    ended = f", ended {moment(run.finished_at, now)}" if run.finished_at else ""
    took = span(((run.finished_at or now) - run.created_at).total_seconds())
    facts.add_row("submitted", f"{moment(run.created_at, now)}{ended} ({took})")
    if run.deadline and not run.finished_at:
        facts.add_row("deadline", f"{moment(run.deadline, now)} ({ago(run.deadline, now)})")
    facts.add_row("steps", _progress(snapshot))
    if run.error and run.finished_at:
        facts.add_row("error", Text(error_text(run.error), style="red"))
    return [title, facts]


def _progress(snapshot: Snapshot) -> RenderableType:
    # Not each item of an each may be at hand, but they are counted.
    steps = [s for s in snapshot.steps if s.kind not in (*_AROUND, StepKind.ITEM) and not _uncalled(s)]
    states = Counter(step.status for step in steps)
    for found in snapshot.items.values():
        states.update(found)
    total = states.total()
    done = sum(number for status, number in states.items() if StepStatus(status).final)
    words = Text(f"{done:,} of {total:,} done")
    for status in (
        StepStatus.RUNNING, StepStatus.READY, StepStatus.WAITING, StepStatus.FAILED, StepStatus.SKIPPED,
        StepStatus.CANCELLED,
    ):  # fmt: skip
        if states[status]:
            words.append(", ").append(f"{states[status]:,} {status}", style=SIGNS[status][1])
    row = Table.grid(padding=(0, 1))
    style = "red" if states[StepStatus.FAILED] else "green"
    bar = ProgressBar(total=max(1, total), completed=done, width=20, complete_style=style, finished_style=style)
    row.add_row(bar, words)
    return row


def _rollback_note(snapshot: Snapshot) -> list[RenderableType]:
    if snapshot.run.finished_at is not None or any(step.status == "running" for step in snapshot.steps):
        return []
    return [Text(), Text(f"byrd why {snapshot.run.id[:8]} says what it waits for.", style="dim")]


# -- the tree --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pause:
    """How the last attempt at a step that waits ended."""

    outcome: str
    error: str | None


class _Tree:
    """Draws the steps."""

    def __init__(self, snapshot: Snapshot, *, every: bool) -> None:
        self.snapshot, self.every, self.now = snapshot, every, snapshot.now
        self.forest = Forest(snapshot.steps)
        self.pauses = {found["no"]: _Pause(found["outcome"], found["error"]) for found in snapshot.attempts}
        self.seen: set[int] = set()
        self.root = Tree("", guide_style="dim", hide_root=True)
        for head in self.forest.roots():
            self._sequence(self.root, head)
        for step in self.forest.unseen(self.seen):
            if not (_uncalled(step) and not every):
                self._step(self.root, step)
        self._rollback()

    def _sequence(self, parent: Tree, head: StepRow) -> None:
        sequence = self.forest.sequence(head)
        shown = sequence if self.every or len(sequence) <= _MANY_STEPS else []
        for step in shown:
            self._step(parent, step)
        if not shown:
            self._long_sequence(parent, sequence)
        for branch in self.forest.branches(sequence[-1]):
            self._sequence(parent, branch)

    def _long_sequence(self, parent: Tree, sequence: Sequence[StepRow]) -> None:
        """Draw what is under way or has failed, and stretches of like steps as one line each."""
        stretch: list[StepRow] = []
        for index, step in enumerate([*sequence, None]):
            plain = step is not None and 0 < index < len(sequence) - 1 and self._is_plain(step)
            if step is not None and plain and (not stretch or stretch[0].status == step.status):
                stretch.append(step)
                continue
            if len(stretch) > 2:
                self.seen.update(s.no for s in stretch)
                text = f" {stretch[0].no} to {stretch[-1].no}  {count(len(stretch), 'step')} {stretch[0].status}"
                parent.add(Text.assemble(sign(stretch[0].status), (text, "dim")))
            else:
                for passed in stretch:
                    self._step(parent, passed)
            stretch = [step] if step is not None and plain else []
            if step is not None and not plain:
                self._step(parent, step)

    def _is_plain(self, step: StepRow) -> bool:
        quiet = step.status in (StepStatus.SUCCEEDED, StepStatus.PENDING, StepStatus.SKIPPED, StepStatus.CANCELLED)
        return quiet and not self.forest.members(step) and not self.forest.callbacks(step)

    def _step(self, parent: Tree, step: StepRow) -> None:
        self.seen.add(step.no)
        node = parent.add(self._line(step))
        if step.error and step.kind not in _AROUND and step.status in (StepStatus.FAILED, StepStatus.CANCELLED):
            node.add(_plain(error_text(step.error), "red"))
        for line in self._checkpoints(step):
            node.add(line)
        self._members(node, step)
        for callback in self.forest.callbacks(step):
            self._hanging(node, callback, "on success")
        for errback in self.forest.errbacks(step):
            if self.every or not _uncalled(errback):
                self._hanging(node, errback, "on failure")

    def _hanging(self, node: Tree, head: StepRow, label: str) -> None:
        self._sequence(node.add(Text(label, style="italic dim")), head)

    def _members(self, node: Tree, step: StepRow) -> None:
        members = self.forest.members(step)
        items = self.snapshot.items.get(step.no)
        number = sum(items.values()) if items else len(members)
        if self.every or number <= _MANY_MEMBERS:
            for member in members:
                self._member(node, member)
            return
        states = [self.forest.state_of_member(member) for member in members]
        node.add(_tally(items or Counter(states)))
        shown: Counter[StepStatus] = Counter()
        for member, state in zip(members, states, strict=True):
            shown[state] += 1
            telling = state in (StepStatus.FAILED, StepStatus.RUNNING, StepStatus.CANCELLED)
            if telling and shown[state] <= _EXAMPLES:
                self._member(node, member)
            else:
                self._mark_seen(member)

    def _member(self, node: Tree, head: StepRow) -> None:
        sequence = self.forest.sequence(head)
        if len(sequence) == 1 and not self.forest.branches(head):
            self._step(node, head)
            return
        label = Text.assemble(sign(self.forest.state_of_member(head)), (f" chain of {len(sequence)}", "dim"))
        self._sequence(node.add(label), head)

    def _mark_seen(self, head: StepRow) -> None:
        waiting = [head]
        while waiting:
            for step in self.forest.sequence(waiting.pop()):
                self.seen.add(step.no)
                waiting += self.forest.members(step)
                waiting += self.forest.branches(step) + self.forest.callbacks(step) + self.forest.errbacks(step)

    def _rollback(self) -> None:
        undoing = self.forest.compensations()
        if not undoing:
            return
        node = self.root.add(Text("rollback", style="bold magenta"))
        for step in undoing:
            added = node.add(self._line(step))
            if step.error and step.status == StepStatus.FAILED:
                added.add(_plain(error_text(step.error), "red"))

    # -- lines -------------------------------------------------------------------------------------

    def _line(self, step: StepRow) -> Text:
        state = self.forest.state(step)
        line = Text.assemble(sign(state), " ", (f"{step.no}", "dim"), " ", no_wrap=True, overflow="ellipsis")
        line.append(self._name(step), style="dim" if state in (StepStatus.PENDING, StepStatus.SKIPPED) else "")
        if step.compensates is not None:
            undone = self.forest.steps.get(step.compensates)
            where = f" of saga {step.saga}" if step.saga is not None else ""
            line.append(f"  undoes {step.compensates} {undone.task if undone else ''}{where}", style="dim")
        for word, style in self._words(step, state):
            line.append("  ").append(word, style=style)
        if step.status == StepStatus.SUCCEEDED and step.kind not in _AROUND and not step.replaced:
            line.append("  → ", style="dim").append(shortened(step.result or "null", 60), style="dim")
        return line

    def _name(self, step: StepRow) -> str:
        if step.kind == StepKind.JOIN:
            return f"group of {len(self.forest.members(step)):,}"
        if step.kind == StepKind.SAGA:
            return "saga"
        if step.signal is not None:
            return f"{step.task} {step.signal}{of_whom(step.signal_of)}"
        return (step.task or "") + (", replaced by" if step.replaced else "")

    def _words(self, step: StepRow, state: StepStatus) -> list[tuple[str, str]]:
        words: list[tuple[str, str]] = []
        if step.mark is not None and step.kind != StepKind.SAGA:
            words.append((step.mark, "magenta"))
        if state in (StepStatus.SKIPPED, StepStatus.CANCELLED):
            words.append((str(state), SIGNS[state][1]))
        if step.status == StepStatus.READY and step.no in self.snapshot.items:
            words.append(("its items are under way", "cyan"))
        elif step.status == StepStatus.READY:
            words.append((self._waiting(step), "cyan"))
        if step.status == StepStatus.WAITING:
            words.append((self._until(step), "cyan"))
        if step.status == StepStatus.RUNNING:
            words.append((f"on {self.snapshot.holders.get(step.worker_id or '', 'a worker that is gone')}", "blue"))
        if (took := self._took(step)) is not None:
            words.append((took, ""))
        if step.attempt > 1 and step.task != EACH:  # which has one for each page
            words.append((f"attempt {step.attempt}", "yellow"))
        if step.retries:
            words.append((count(step.retries, "retry", "retries"), "yellow"))
        if step.preemptions:
            words.append((count(step.preemptions, "preemption"), "yellow"))
        return words

    def _took(self, step: StepRow) -> str | None:
        started = step.started_at
        if started is None and step.kind in _AROUND:
            starts = [member.started_at for member in self.forest.members(step) if member.started_at]
            started = min(starts, default=None)
        if started is None or step.status == StepStatus.CANCELLED:
            return None
        ended = step.finished_at or (self.now if step.status == StepStatus.RUNNING else None)
        return span((ended - started).total_seconds()) if ended else None

    def _waiting(self, step: StepRow) -> str:
        if self.snapshot.run.status == RunStatus.PAUSED:
            return "paused"
        pause = self.pauses.get(step.no)
        after = ""
        if pause is not None and pause.outcome == "retried":
            after = f" after {error_text(pause.error, longest=60)}" if pause.error else ""
        elif pause is not None and pause.outcome == "preempted":
            after = ", its worker was lost"
        if step.run_at is not None and step.run_at > self.now:
            again = "again at" if step.attempt else "at"
            return f"{again} {moment(step.run_at, self.now)} ({_until(step.run_at, self.now)}){after}"
        return f"ready, queue {step.queue}{after}"

    def _until(self, step: StepRow) -> str:
        if step.kind == StepKind.SAGA:
            return f"failed, is being undone since {moment(step.ready_at, self.now)}"
        if step.run_at is None:
            return f"since {moment(step.ready_at, self.now)}"
        return f"until {moment(step.run_at, self.now)} ({ago(step.run_at, self.now)})"

    def _checkpoints(self, step: StepRow) -> list[Text]:
        found = self.snapshot.checkpoints.get(step.no, [])
        if step.task == EACH:
            return []  # its items are drawn
        lines = [
            _checkpoint(name, counts) for name, counts in found if not name.startswith(("step:", "wait:", "beat:"))
        ]
        substeps = [name.removeprefix("step:") for name, _ in found if name.startswith("step:")]
        if substeps:
            more = f" and {len(substeps) - _MANY_SUBSTEPS:,} more" if len(substeps) > _MANY_SUBSTEPS else ""
            lines.append(_plain(f"sub-steps done: {', '.join(substeps[:_MANY_SUBSTEPS])}{more}", "dim"))
        return lines


def _until(when: datetime, now: datetime) -> str:
    return ago(when, now) if when.year < 9999 else "when it is resumed"


def _checkpoint(name: str, counts: Counts) -> Text:
    line = _plain(f"{name}: {counts.completed:,} done", "dim")
    if counts.failed:
        line.append(f", {counts.failed:,} failed", style="yellow")
    if counts.done:
        return line.append(", complete")
    return line.append(f", at {shortened(counts.cursor, 40)}" if counts.cursor is not None else "")


def _tally(counts: Mapping[str, int]) -> Text:
    """Return how many members are in which state: ``✔ 980 succeeded  ● 3 running``."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for status in StepStatus:
        if counts.get(status):
            line.append("  " if line else "").append(sign(status)).append(f" {counts[status]:,} {status}")
    return line


def _plain(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _uncalled(step: StepRow) -> bool:
    return (step.kind == StepKind.ERRBACK or step.on_failure) and step.status in (
        StepStatus.PENDING,
        StepStatus.SKIPPED,
    )
