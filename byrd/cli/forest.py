"""A run's steps as people think of them: sequences, groups with their members, what hangs on a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from byrd.model import StepKind, StepStatus
from byrd.store import StepRow

#: Of several states below one node, the one that says most about it.
_TELLING = (
    StepStatus.RUNNING, StepStatus.READY, StepStatus.WAITING, StepStatus.FAILED, StepStatus.PENDING,
    StepStatus.CANCELLED,
)  # fmt: skip


class Forest:
    """The plan's edges, read backwards: a step knows only its predecessor and its join."""

    def __init__(self, steps: Sequence[StepRow]) -> None:
        self.steps = {step.no: step for step in steps}
        self._after: dict[int | None, list[StepRow]] = defaultdict(list)
        self._tails: dict[int, list[StepRow]] = defaultdict(list)
        for step in steps:
            if step.kind == StepKind.COMPENSATION:
                continue
            self._after[step.after].append(step)
            if step.join_no is not None:
                self._tails[step.join_no].append(step)
        self._heads = {no: self._heads_of(no) for no in self._tails}
        self._inner = {head.no for heads in self._heads.values() for head in heads}
        self._states: dict[int, StepStatus] = {}

    def roots(self) -> list[StepRow]:
        """Return the steps with which the run began."""
        return [step for step in self._after[None] if step.no not in self._inner]

    def members(self, step: StepRow) -> list[StepRow]:
        """Return the first step of each member of a group, or of the canvas that replaced a step."""
        return self._heads.get(step.no, [])

    def sequence(self, head: StepRow) -> list[StepRow]:
        """Return a step and what follows it one after another."""
        found = [head]
        while True:
            following = self._following(found[-1])
            if len(following) != 1:
                return found
            found += following

    def branches(self, step: StepRow) -> list[StepRow]:
        """Return what follows where more than one thing does."""
        following = self._following(step)
        return following if len(following) > 1 else []

    def callbacks(self, step: StepRow) -> list[StepRow]:
        """Return the callbacks that hang on a step (Celery's ``link``)."""
        return [s for s in self._next(step) if not s.on_failure and not self._continues(step, s)]

    def errbacks(self, step: StepRow) -> list[StepRow]:
        """Return the errbacks that hang on a step (Celery's ``link_error``)."""
        return [s for s in self._next(step) if s.on_failure]

    def compensations(self) -> list[StepRow]:
        """Return the compensations in the order in which they run."""
        return sorted((s for s in self.steps.values() if s.kind == StepKind.COMPENSATION), key=lambda s: s.no)

    def state(self, step: StepRow) -> StepStatus:
        """Return a step's state; of a group or chain that is under way, the state that says most about it."""
        if step.no not in self._states:
            own = StepStatus(step.status)
            if own is StepStatus.PENDING and self.members(step):
                own = _most_telling([self.state_of_member(member) for member in self.members(step)])
            self._states[step.no] = own
        return self._states[step.no]

    def state_of_member(self, head: StepRow) -> StepStatus:
        """Return the state of a member of a group: of its last step, or of the one that it has come to."""
        sequence = self.sequence(head)
        last = self.state(sequence[-1])
        return last if last.final else _most_telling([self.state(step) for step in sequence])

    def unseen(self, seen: Iterable[int]) -> list[StepRow]:
        """Return the steps that no walk from the roots has met."""
        missing = self.steps.keys() - set(seen)
        return [self.steps[no] for no in sorted(missing) if self.steps[no].kind != StepKind.COMPENSATION]

    def _next(self, step: StepRow) -> Iterator[StepRow]:
        return (s for s in self._after[step.no] if s.no not in self._inner)

    def _following(self, step: StepRow) -> list[StepRow]:
        return [s for s in self._next(step) if not s.on_failure and self._continues(step, s)]

    def _continues(self, step: StepRow, following: StepRow) -> bool:
        """Tell a chain's next step from a callback: a callback is of another kind than what it hangs on."""
        kind = self._kind(following)
        return kind == StepKind.TASK or kind == self._kind(step)

    def _kind(self, step: StepRow) -> str:
        while step.kind in (StepKind.JOIN, StepKind.SAGA) and self.members(step):
            step = self.members(step)[0]
        return StepKind.TASK if step.kind in (StepKind.JOIN, StepKind.SAGA, StepKind.WAIT) else step.kind

    def _heads_of(self, join_no: int) -> list[StepRow]:
        start = self.steps[join_no].after if join_no in self.steps else None
        tails = sorted(self._tails[join_no], key=lambda s: (s.join_pos is None, s.join_pos or 0))
        return [self._head_of(tail, start) for tail in tails]

    def _head_of(self, tail: StepRow, start: int | None) -> StepRow:
        """Walk back from a member's last step to its first, which comes right after what the group comes after."""
        step = tail
        while step.after is not None and step.after != start and step.after in self.steps:
            step = self.steps[step.after]
        return step


def _most_telling(states: Sequence[StepStatus]) -> StepStatus:
    for state in _TELLING:
        if state in states:
            # A failed or finished part with more to come is a member that is under way.
            return state
    return states[0] if states else StepStatus.PENDING
