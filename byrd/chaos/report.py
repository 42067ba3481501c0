"""What a session found: plain facts, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from byrd.chaos.faults import Fault


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not be."""

    run: str
    step: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long after faults of one kind the steps that they hit ran again, in seconds."""

    faults: int
    steps: int
    p50: float | None
    p95: float | None
    max: float | None


def recovery_of(faults: int, seconds: Sequence[float]) -> Recovery:
    """Return the figures of one kind of fault."""
    found = sorted(seconds)
    if not found:
        return Recovery(faults, 0, None, None, None)

    def at(share: float) -> float:
        return round(found[min(len(found) - 1, round(share * (len(found) - 1)))], 3)

    return Recovery(faults, len(found), at(0.5), at(0.95), round(found[-1], 3))


@dataclass(frozen=True, slots=True)
class Audit:
    """What became of the runs, from the tables."""

    #: Runs whose submit raised and which are in the table all the same; they count among the submitted.
    unsure: int
    submitted: int
    finished: int
    statuses: Mapping[str, int]
    steps: int
    completions: int
    effects: int
    #: Why effects were repeated, counted.
    repeated: Mapping[str, int]
    lost: Sequence[Finding]
    stuck: Sequence[Finding]
    wrong: Sequence[Finding]
    twice: Sequence[Finding]
    unexplained: Sequence[Finding]
    #: Attempts that lost their worker, or were handed back, though no fault of this session hit them.
    unprovoked: Sequence[Finding]
    #: Rows that break an invariant of Byrd's tables, and did not before the session.
    broken: Sequence[Finding]
    recoveries: Mapping[str, Recovery]


@dataclass(frozen=True, slots=True)
class Report:
    """A session and its audit."""

    seed: int
    began: datetime
    seconds: float
    drain_seconds: float
    targets: Sequence[str]
    faults: Sequence[Fault]
    #: How many faults of each kind.
    counts: Mapping[str, int]
    audit: Audit
    #: Workers of chaos's own that ended by themselves, and other troubles of the session.
    troubles: Sequence[str] = field(default_factory=tuple)
    #: It was asked to end its faults before their time.
    interrupted: bool = False

    @property
    def failures(self) -> list[str]:
        """One line for each kind of thing that should not be; none when all is well."""
        audit = self.audit
        counted = {
            "lost": audit.lost,
            "stuck": audit.stuck,
            "ended otherwise than they should": audit.wrong,
            "recorded twice": audit.twice,
            "repeated without a reason": audit.unexplained,
        }
        if audit.broken:
            counted[f"{'breaks' if len(audit.broken) == 1 else 'break'} an invariant"] = audit.broken
        lines = [f"{len(found):,} {what}" for what, found in counted.items() if found]
        return [*lines, *self.troubles]

    def shape(self) -> dict[str, Any]:
        """Return the report as plain values, with keys that stay the same from version to version."""
        audit = self.audit

        def findings(found: Sequence[Finding]) -> list[dict[str, Any]]:
            return [asdict(one) for one in found]

        return {
            "ok": not self.failures,
            "failures": self.failures,
            "seed": self.seed,
            "began": self.began,
            "seconds": round(self.seconds, 1),
            "drain_seconds": round(self.drain_seconds, 1),
            "interrupted": self.interrupted,
            "targets": list(self.targets),
            "runs": {
                "submitted": audit.submitted,
                "unsure": audit.unsure,
                "finished": audit.finished,
                "lost": len(audit.lost),
                "stuck": len(audit.stuck),
                "wrong": len(audit.wrong),
                "statuses": dict(audit.statuses),
            },
            "steps": {"all": audit.steps, "completed": audit.completions, "recorded_twice": len(audit.twice)},
            "effects": {
                "written": audit.effects,
                "repeated": sum(audit.repeated.values()),
                "reasons": dict(audit.repeated),
                "unexplained": len(audit.unexplained),
            },
            "unprovoked": len(audit.unprovoked),
            "invariants": {"broken": len(audit.broken)},
            "faults": dict(self.counts),
            "recovery": {kind: asdict(found) for kind, found in audit.recoveries.items()},
            "timeline": [
                {"kind": fault.kind, "at": fault.at, "what": fault.what, "hit": fault.hit} for fault in self.faults
            ],
            "findings": {
                "lost": findings(audit.lost),
                "stuck": findings(audit.stuck),
                "wrong": findings(audit.wrong),
                "recorded_twice": findings(audit.twice),
                "unexplained": findings(audit.unexplained),
                "unprovoked": findings(audit.unprovoked),
                "broken_invariants": findings(audit.broken),
            },
        }
