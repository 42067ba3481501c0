"""What docs/sagas.md says must have become of each step of a run, whatever was killed, cancelled or retried meanwhile.

It goes by the canvas that was submitted, by how each step ended and by which commands were accepted; what is to be
undone, by whom and in which order is worked out here anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cached_property
from itertools import groupby
from typing import Any

from tests.reliability.saga_maker import ASKED, Leaf, Part, Path, all_leaves_of, leaves_of
from tests.reliability.saga_records import Effect, Event, Records, RunRecord, Step, each_name

_FINAL = ("succeeded", "failed", "cancelled", "skipped")
#: A claim does not see the failure of a step that commits just then.
_SLACK = timedelta(seconds=1)


def fails(part: Part, *, perhaps: bool = False) -> bool:
    """Tell whether a canvas fails, for certain, unless it is mended or told to do otherwise.

    ``perhaps``: or may, for a step that has ended badly succeeds if its effect is found before another attempt.
    """
    return any(_breaks(leaf, perhaps=perhaps) for leaf in leaves_of(part) if leaf.item_of is None)


def _breaks(leaf: Leaf, *, perhaps: bool) -> bool:
    """Tell whether a leaf fails by itself."""
    match leaf.kind:
        case "wait":
            return bool(leaf.part["mode"] == "lost")
        case "each":
            failing = sum(_breaks(one, perhaps=perhaps) for one in leaves_of(leaf.part) if one.item_of is not None)
            return bool(failing > leaf.part["tolerate"])
        case "sub":
            return fails(leaf.part["canvas"], perhaps=perhaps)
        case "stall":
            return bool(leaf.part["breaks"] and (perhaps or leaf.part["asks"]))
    return bool(leaf.part["breaks"])


class Case:
    """One run, and the canvas that it was made of.

    ``path``: where its canvas stands in the outermost one.  ``from_outside``: it is a part of a run, or a saga, that is
    rolled back.  ``mended``: nothing of it was broken any more when it was last tried.
    """

    def __init__(
        self,
        records: Records,
        part: Part,
        run_id: str,
        *,
        path: Path = (),
        from_outside: bool = False,
        mended: bool = False,
    ) -> None:
        self.records, self.part, self.mended = records, part, mended
        self.run: RunRecord = records.runs[run_id]
        self.leaves = list(leaves_of(part, path))
        self.from_outside = from_outside
        self.seen: Counter[str] = Counter()
        #: What was undone, in this run and those within it, by which effects.
        self.undone: list[tuple[Leaf, list[int]]] = []
        self._sagas: dict[Path, bool] = {}

    def step(self, leaf: Leaf) -> Step | None:
        """Return the step of a leaf: an item may not have come into the run."""
        name = each_name(leaf.part["items"]) if leaf.kind == "each" else leaf.name
        step = self.run.named.get(name)
        assert step is not None or leaf.item_of is not None, f"{name} is not in {self}"
        return step

    def _items(self, each: Leaf) -> list[Step | None]:
        return [self.step(one) for one in self.leaves if one.item_of is not None and one.item_of.part is each.part]

    # -- what the documentation says -----------------------------------------------------------------

    @cached_property
    def failures(self) -> list[tuple[Leaf, Step]]:
        """The leaves that have failed by themselves, and of which a rollback may be the consequence."""
        found = []
        for leaf in self.leaves:
            step = self.step(leaf) if leaf.item_of is None and not leaf.retriable else None
            if step is not None and step.status == "failed" and step.cause is None:
                found.append((leaf, step))
        return found

    @cached_property
    def is_rolled_back(self) -> bool:
        """Whether all of the run is to be undone: it failed, or somebody wished it, and it had not passed a pivot."""
        if self.run.pivot is not None:
            return False
        if self.from_outside or self.run.last("rollback_requested"):
            return True
        cancel = self.run.last("cancel_requested")
        if cancel is not None:
            return bool(cancel.detail["compensate"])
        return self.run.status == "failed" and bool(self.failures)

    @cached_property
    def saga_numbers(self) -> dict[Path, int]:
        """The steps that stand for the sagas of the canvas."""
        found: dict[Path, int] = {}
        for leaf in self.leaves:
            step = self.step(leaf)
            if step is None:
                continue
            no = step.saga
            for place in reversed(leaf.sagas):
                assert no is not None, f"{leaf.name} is in no saga in {self}"
                assert found.setdefault(place, no) == no
                no = self.run.steps[no].saga
            assert no is None
        return found

    def saga_is_rolled_back(self, place: Path) -> bool:
        """Tell whether a saga in the run is to be undone by itself: a step in it failed for good, before any pivot."""
        if place not in self._sagas:
            self._sagas[place] = self._saga_is_rolled_back(place)
        return self._sagas[place]

    def _saga_is_rolled_back(self, place: Path) -> bool:
        no = self.saga_numbers[place]
        saga = self.run.steps[no]
        if saga.status != "failed" or not any(place in leaf.sagas for leaf, _ in self.failures):
            return False
        passed = next((event for event in self.run.events if event.what == "pivot_passed"), None)
        if passed is None:
            return True
        begun = next((e for e in self.run.events if e.what == "rollback_started" and e.step_no == no), None)
        if begun is not None:
            assert begun.id < passed.id, f"saga {no} is rolled back after the pivot of {self}"
            self.seen["saga undone beside a pivot"] += 1
            return True
        assert saga.finished_at is not None
        assert saga.finished_at >= passed.at - _SLACK, f"saga {no} was not undone, before any pivot, in {self}"
        self.seen["saga kept for a pivot"] += 1
        return False

    def undone_by(self, leaf: Leaf) -> tuple[bool, int | None]:
        """Tell whether a leaf is to be undone, if it may have taken effect, and by which saga; None is the run."""
        for place in reversed(leaf.sagas):
            if self.saga_is_rolled_back(place):
                return True, self.saga_numbers[place]
        return self.is_rolled_back, None

    @property
    def can_be_retried(self) -> bool:
        """Whether an operator may retry a run that has ended: nothing of it was undone."""
        return self.run.status in ("failed", "cancelled") and not self.run.undos

    @property
    def can_be_rolled_back(self) -> bool:
        """Whether an operator may roll back a run that has ended: it has not passed a pivot, and has something left."""
        if self.run.pivot is not None:
            return False
        for leaf in self.leaves:
            step = self.step(leaf)
            if step is not None and leaf.undoable and step.may_have_taken_effect and step.no not in self.run.undos:
                return True
        return any(case.can_be_rolled_back for case in self.runs_within(undone=False))

    def runs_within(self, *, undone: bool = True) -> Iterator[Case]:
        """Yield the runs that workflows within this one have now, those that it has undone among them or not."""
        for leaf in self.leaves:
            step = self.step(leaf) if leaf.kind == "sub" else None
            if step is not None and step.id in self.records.children and (undone or step.no not in self.run.undos):
                yield Case(self.records, leaf.part["canvas"], self.records.children[step.id], path=leaf.path)

    # -- whether it is so ----------------------------------------------------------------------------

    def check(self) -> None:
        """Fail unless all is as it must be."""
        self._check_status()
        self._check_pivot()
        for leaf in self.leaves:
            step = self.step(leaf)
            if step is None:
                assert not self.run.effects[leaf.name]
                continue
            assert step.status in _FINAL, f"{leaf.name} is {step.status} in {self}"
            self._check_reason(leaf, step)
            match leaf.kind:
                case "wait":
                    self._check_wait(leaf, step)
                case "each":
                    self._check_each(leaf, step)
                case "sub":
                    self._check_within(leaf, step)
                case _:
                    self._check_step(leaf, step)
        assert all(undo.status in ("succeeded", "skipped") for undo in self.run.undos.values()), self
        self._check_order()

    def _check_status(self) -> None:
        run = self.run
        steps = [(leaf, self.step(leaf)) for leaf in self.leaves if leaf.item_of is None]
        if run.status == "succeeded":
            assert all(step is not None and step.status == "succeeded" for _, step in steps), self
        elif run.status == "failed":
            assert any(step.status == "failed" and step.cause is None for _, step in steps if step), self
        else:
            assert run.status == "cancelled"
            assert any(event.what in ("cancel_requested", "rollback_requested") for event in run.since_retry()), self
        self.seen[f"run {run.status}"] += 1
        if self.mended and not run.last("cancel_requested") and not run.last("rollback_requested"):
            lost = any(leaf.part.get("mode") == "lost" for leaf in all_leaves_of(self.part))
            kept = lost or self._holds_what_is_undone_in_part
            assert kept or run.status == "succeeded", f"it was mended, and failed again: {self}"
        if not self.is_touched:
            assert fails(self.part) <= (run.status == "failed") <= fails(self.part, perhaps=True), self

    @cached_property
    def is_touched(self) -> bool:
        """Whether somebody has stopped, retried, rolled back or mended the run, or one within it."""
        if self.run.had("cancel_requested", "rollback_requested", "retried"):
            return True
        if any(leaf.name in self.records.mended for leaf in self.leaves):
            return True
        return any(
            Case(self.records, leaf.part["canvas"], run_id).is_touched
            for leaf in self.leaves
            if leaf.kind == "sub"
            for run_id in self._runs_of(leaf)
        )

    @property
    def _holds_what_is_undone_in_part(self) -> bool:
        """Whether a workflow within was undone in part, and cannot be begun anew: its step fails again."""
        return any(
            (case.run.undos and (case.run.pivot is not None or case.run.last("rollback_requested")))
            or case._holds_what_is_undone_in_part
            for case in self.runs_within()
        )

    def _was_stopped(self, leaf: Leaf) -> bool:
        """Tell whether somebody has cancelled the run of a workflow within, or one within that."""
        cases = [Case(self.records, leaf.part["canvas"], run_id) for run_id in self._runs_of(leaf)]
        return any(
            case.run.had("cancel_requested") or any(case._was_stopped(one) for one in case.leaves if one.kind == "sub")
            for case in cases
        )

    def _runs_of(self, leaf: Leaf) -> set[str]:
        """Return the runs that a workflow within has had, those that were begun anew since among them."""
        step = self.step(leaf)
        found = {run for run in self.records.generations[leaf.name] if self.records.runs[run].parent_step is None}
        if step is not None and step.id in self.records.children:
            found.add(self.records.children[step.id])
        return found

    def _check_pivot(self) -> None:
        passed = [(leaf, step) for leaf in self.leaves if leaf.pivot and (step := self.step(leaf)) is not None]
        succeeded = {step.no for _, step in passed if step.status == "succeeded"}
        assert (self.run.pivot is not None) == bool(succeeded), self
        if self.run.pivot is None:
            self.seen["pivot not passed"] += bool(passed)
            return
        assert self.run.pivot in succeeded
        self.seen["pivot passed"] += 1
        assert all(undo.saga is not None for undo in self.run.undos.values()), f"undone after the pivot: {self}"
        first = self.run.steps[self.run.pivot]
        if first.broken_off or self.run.had("retried"):
            return
        assert first.started_at is not None
        for leaf, step in self.failures:
            assert step.finished_at is not None
            assert first.started_at <= step.finished_at + _SLACK, f"the pivot started after {leaf.name} failed: {self}"

    def _check_reason(self, leaf: Leaf, step: Step) -> None:
        """Check that there is a reason for a step to have ended badly."""
        if step.status == "succeeded":
            return
        if step.status == "failed" and step.cause is None:
            within = leaf.kind == "sub" and self._was_stopped(leaf)
            items = leaf.kind == "each" and sum(map(_is_bad, self._items(leaf))) > leaf.part["tolerate"]
            assert _breaks(leaf, perhaps=True) or within or items, f"{leaf.name} failed for no reason in {self}"
            return
        before = any(one.comes_before(leaf) and _is_bad(self.step(one)) for one in self.leaves)
        of_each = leaf.item_of is not None and _is_bad(self.step(leaf.item_of))
        stopped = self.run.last("cancel_requested") is not None or any(
            self.run.steps[self.saga_numbers[place]].status in ("failed", "cancelled") for place in leaf.sagas
        )
        if step.status == "cancelled" and leaf.pivot and self.failures:
            self.seen["pivot stopped"] += 1
            stopped = True
        if step.status == "cancelled":
            assert stopped or of_each, f"{leaf.name} was cancelled for no reason in {self}"
        else:
            assert stopped or before or of_each, f"{leaf.name} is {step.status} for no reason in {self}"

    # -- steps and their effects ---------------------------------------------------------------------

    def _check_step(self, leaf: Leaf, step: Step) -> None:
        effects = self.run.effects[leaf.name]
        did = [effect for effect in effects if effect.what == "do"]
        undid = [effect for effect in effects if effect.what == "undo"]
        self._check_done(leaf, step, did)
        if leaf.kind == "trade":
            self._check_operations(leaf, step, effects)
        undo = self.run.undos.get(step.no)
        undone, saga = self.undone_by(leaf)
        if not (undone and leaf.undoable and step.may_have_taken_effect):
            assert undo is None, f"{leaf.name} was undone, and should have been kept, in {self}"
            assert not undid
            self.seen["kept"] += step.status == "succeeded"
            return
        assert undo is not None, f"{leaf.name} is lost: nothing undoes it in {self}"
        assert undo.saga == saga, f"{leaf.name} was undone by {undo.saga} instead of {saga} in {self}"
        self._check_undone(leaf, step, undo, did, undid)
        self.undone.append((leaf, [effect.id for effect in undid]))
        self.seen["undone"] += 1
        self.seen["undone by a saga"] += saga is not None
        self.seen["item undone"] += leaf.item_of is not None
        self.seen["undone, not known"] += step.status != "succeeded"

    def _check_done(self, leaf: Leaf, step: Step, did: list[Effect]) -> None:
        """Check that what is on record was done, and nothing besides."""
        if step.status == "succeeded":
            assert did, f"{leaf.name} succeeded, and did nothing, in {self}"
            was_asked_for = leaf.kind in ASKED and step.result == f'"found {leaf.name}"'
            assert not leaf.part["breaks"] or leaf.name in self.records.mended or was_asked_for
            assert was_asked_for or step.result == f'"did {leaf.name}"'
        elif not step.broken_off:
            raised_after_it = leaf.kind == "book" and leaf.part["failures"]
            assert raised_after_it or not did, f"{leaf.name} is {step.status}, and did something, in {self}"
        if leaf.kind in ASKED:
            assert len(did) <= 1, f"{leaf.name} was done {len(did)} times, though it can be asked for"
        assert len(did) <= 1 + step.broken_off, f"{leaf.name} was done {len(did)} times in {self}"
        if leaf.kind == "few":
            for at_once, most in (json.loads(effect.detail) for effect in did):
                assert at_once <= most, f"too many at once: {did}"
                self.seen["at a limit"] += at_once == most
        self.seen["tried again"] += "retried" in step.outcomes
        self.seen["tried again after a pivot"] += "failed" in step.outcomes[:-1]

    def _check_undone(self, leaf: Leaf, step: Step, undo: Step, did: list[Effect], undid: list[Effect]) -> None:
        """Check that a step was undone once, as recorded, or that an operator has seen to it."""
        by_hand = self._by_hand(undo)
        self.seen["seen to by hand"] += bool(by_hand)
        if by_hand:
            assert leaf.part["undo_breaks"], f"{leaf.name} was not stuck in {self}"
            [event] = by_hand
            assert undo.status == ("skipped" if event.what == "compensation_skipped" else "succeeded")
            assert not undid
            return
        assert undo.status == "succeeded", f"{leaf.name} is not undone: {undo.status} in {self}"
        assert {effect.key for effect in undid} <= {undo.id}
        assert len(undid) <= 1 + undo.broken_off, f"{leaf.name} was undone {len(undid)} times in {self}"
        confirmed = leaf.kind in ASKED
        assert undid or (confirmed and step.status != "succeeded" and not did), f"{leaf.name} is not undone in {self}"
        assert not leaf.part["undo_breaks"] or f"undo {leaf.name}" in self.records.mended
        if step.status == "succeeded":
            known = [True, json.loads(step.result or "null")]
        else:
            known = [True, f"found {leaf.name}"] if confirmed else [False, None]
        assert all(json.loads(effect.detail) == known for effect in undid), f"{leaf.name}: {undid} is not of {known}"
        if confirmed and step.status != "succeeded":
            self.seen["found, and undone" if undid else "not found, and so not undone"] += 1

    def _by_hand(self, undo: Step) -> list[Event]:
        """Return what an operator has said of a compensation."""
        return [
            event
            for event in self.run.events
            if event.step_no == undo.no and event.what in ("compensation_skipped", "done_by_hand")
        ]

    def _check_operations(self, leaf: Leaf, step: Step, effects: list[Effect]) -> None:
        """Check that of the operations in a task all were done, or none; in each round of it."""
        told = [effect for effect in effects if effect.what.startswith(("op ", "unop "))]
        rounds = [
            list(found)
            for _, found in groupby(sorted(told, key=lambda one: (_round(one), one.id)), key=_round)
        ]  # fmt: skip
        for number, one in enumerate(rounds, 1):
            done = {effect.what.removeprefix("op ") for effect in one if effect.what.startswith("op ")}
            undone = {effect.what.removeprefix("unop ") for effect in one if effect.what.startswith("unop ")}
            last = number == len(rounds)
            if last and step.status == "succeeded":
                assert (done, undone) == ({"sell", "buy"}, set()), f"{leaf.name}: {one} in {self}"
            elif not last or (step.status == "failed" and step.cause is None):
                assert undone == done, f"{leaf.name}: {one} in {self}"
                self.seen["operations undone"] += 1
            assert undone <= done
            times = Counter(effect.what for effect in one)
            assert max(times.values()) <= 1 + step.broken_off
            if undone == {"sell", "buy"}:
                ends = {what: [effect.id for effect in one if effect.what == f"unop {what}"] for what in undone}
                assert max(ends["buy"]) < min(ends["sell"]), f"{leaf.name}: undone in the wrong order: {one}"

    # -- what has no effect of its own ---------------------------------------------------------------

    def _check_wait(self, leaf: Leaf, step: Step) -> None:
        assert step.no not in self.run.undos
        if step.status != "succeeded":
            return
        value, sent = json.loads(step.result or "null"), {"for": leaf.name}
        values: dict[str, list[Any]] = {
            "early": [sent], "late": [sent], "lost": [sent], "default": [leaf.part.get("default")],
            "race": [sent, leaf.part.get("default")],
        }  # fmt: skip
        assert value in values[leaf.part["mode"]], f"{leaf.name} got {value} in {self}"
        self.seen["signal" if value == sent else "default"] += 1

    def _check_each(self, leaf: Leaf, step: Step) -> None:
        assert step.no not in self.run.undos
        if step.status == "succeeded":
            items = self._items(leaf)
            assert None not in items
            bad = sum(map(_is_bad, items))
            assert bad <= leaf.part["tolerate"]
            self.seen["each"] += 1
            self.seen["item tolerated"] += bad

    def _check_within(self, leaf: Leaf, step: Step) -> None:
        """Check the run of a workflow within, and those that it was begun anew after."""
        undone, saga = self.undone_by(leaf)
        undo = self.run.undos.get(step.no)
        if undo is not None:
            assert undone, f"{leaf.name} was undone, and should have been kept, in {self}"
            assert undo.saga == saga
            self.seen["workflow within undone"] += 1
        child = self.records.children.get(step.id)
        for run_id in self._runs_of(leaf):
            now = run_id == child
            case = Case(
                self.records, leaf.part["canvas"], run_id, path=leaf.path, from_outside=now and undone,
                mended=now and self.mended and step.status == "succeeded",
            )  # fmt: skip
            case.check()
            self.seen += case.seen
            if now and not self._is_undone_at_another_time(leaf, step, case):
                self.undone += case.undone
                continue
            check_order(case.undone)
            if not now:
                assert case.run.undos, f"it was begun anew, and not undone: {case}"
                assert case.run.pivot is None
                assert not case.can_be_rolled_back, f"it was begun anew, and something is left of it: {case}"
                self.seen["workflow within begun anew"] += 1
        if step.status == "succeeded":
            run = self.records.runs[str(child)]
            assert run.status == "succeeded" or run.had("rollback_requested"), f"{leaf.name} in {self}"

    def _is_undone_at_another_time(self, leaf: Leaf, step: Step, case: Case) -> bool:
        """Tell whether a workflow within need not be undone between what came before it and what came after."""
        undo = self.run.undos.get(step.no)
        let_be = undo is not None and bool(self._by_hand(undo))
        tolerated = leaf.item_of is not None and step.status != "succeeded"  # it has undone itself, and others went on
        asked = any(e.what == "rollback_requested" and e.detail["by"] == "test" for e in case.run.events)
        self.seen["workflow within let be"] += let_be
        self.seen["workflow within tolerated"] += tolerated
        return let_be or tolerated or asked

    # -- order ---------------------------------------------------------------------------------------

    def _check_order(self) -> None:
        """Check that of two steps that followed one another the later was undone first: its compensation, as recorded.

        So it is for the steps of this run.  :func:`check_order` looks at the effects of all.
        """
        found = []
        for leaf in self.leaves:
            step = self.step(leaf)
            undo = self.run.undos.get(step.no) if step is not None else None
            if undo is not None:
                found.append((leaf, undo))
        for one, undo in found:
            for other, earlier in found:
                if one.comes_before(other):
                    assert earlier.finished_at is not None
                    assert undo.ready_at is not None
                    assert earlier.finished_at <= undo.ready_at, f"{one.name} was undone before {other.name} in {self}"

    def __str__(self) -> str:
        steps = " ".join(
            f"{step.no}:{step.name or step.kind}={step.status}{step.outcomes or ''}"
            for step in sorted(self.run.steps.values(), key=lambda step: step.no)
        )
        events = " ".join(f"{event.what}{event.detail or ''}" for event in self.run.events)
        return f"run {self.run.id}, {self.run.status}: {steps}; {events}; {self.part}"


def check_order(undone: Iterable[tuple[Leaf, list[int]]]) -> None:
    """Check, by their effects, that of two steps that followed one another the later was undone first."""
    found = [(leaf, effects) for leaf, effects in undone if effects]
    for one, effects in found:
        for other, earlier in found:
            in_order = not one.comes_before(other) or max(earlier) < min(effects)
            assert in_order, f"{one.name} was undone before {other.name}, by {effects} and {earlier}"


def _is_bad(step: Step | None) -> bool:
    return step is None or step.status != "succeeded"


def _round(effect: Effect) -> int:
    return int(effect.key.rpartition(":")[2])
