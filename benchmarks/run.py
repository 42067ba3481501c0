"""Runs the cases: round by round, in each round engine by engine, each with new tables and workers of its own."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import FINISHED, GROWTH_CASES, PROCESSES, Case, Kind, Scale
from benchmarks.client import Client, client
from benchmarks.engines import BYRD, Engine
from benchmarks.environments import python_of
from benchmarks.errors import BenchmarkError, UnavailableError
from benchmarks.peers.protocol import Config
from benchmarks.samples import PROCESSES as USUAL
from benchmarks.samples import Outcome, Sample, Trouble, percentile
from benchmarks.servers import Servers

#: Growth is measured in this many rounds at most, and memory is looked at after so many steps.
_GROWTH_ROUNDS = 2
_EARLY_STEPS, _LATER_STEPS = 5_000, 50_000
_ITEMS, _EVERY = 100_000, 100
#: A load is the last one for an engine when half of its canvases take longer than this.
_OVERLOAD_MS = 1000.0
#: Submitted and run before anything else, when the cases ask for no drain.
_WARM_UP_RUNS = 100
_MB = 2**20


@dataclass(frozen=True, slots=True)
class Block:
    """What one engine does in one go, with ``processes`` that run steps and ``finished`` runs in its tables."""

    engine: Engine
    cases: tuple[Case, ...]
    round: int
    processes: int = USUAL
    finished: int = 0

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        grown = f", {self.processes} processes" if self.processes != USUAL else ""
        full = f", {self.finished:,} finished runs" if self.finished else ""
        return f"round {self.round + 1}: {self.engine.title}{grown}{full}"


class CaseError(Exception):
    """A case failed; ``case`` is its name."""

    def __init__(self, case: str, message: str) -> None:
        super().__init__(message)
        self.case = case


def blocks(engines: Sequence[Engine], cases: Sequence[Case], growth: Sequence[str], *, rounds: int) -> list[Block]:
    """Return what there is to do: in each round every engine begins once more at another place."""
    found = []
    growing = tuple(case for case in cases if case.name in GROWTH_CASES)
    for number in range(rounds):
        turn = number % max(1, len(engines))
        order = [*engines[turn:], *engines[:turn]]
        for engine in order:
            here = tuple(case for case in cases if number == 0 or not case.once or engine.name == BYRD)
            found += [Block(engine, here, number)] if here else []
        if number < _GROWTH_ROUNDS:
            if "processes" in growth:
                grown = itertools.product(order, (count for count in PROCESSES if count != USUAL))
                found += [Block(engine, growing, number, processes=count) for engine, count in grown]
            if "tables" in growth:
                own = [engine for engine in order if engine.name == BYRD]
                filled = itertools.product(own, (count for count in FINISHED if count))
                found += [Block(engine, growing, number, finished=count) for engine, count in filled]
    return found


class Comparison:
    """Runs blocks, and keeps what they find out."""

    def __init__(self, servers: Servers, scale: Scale, folder: Path, *, options: dict[str, dict[str, Any]]) -> None:
        self.outcome = Outcome()
        self._servers = servers
        self._scale = scale
        self._folder = folder
        self._options = options
        self._counts: dict[tuple[str, int, str], int] = {}
        self._numbers = itertools.count()

    def run(self, block: Block, progress: Callable[[str], None] = lambda _: None) -> None:
        """Run a block; a case that fails is left out from then on, and the ones after it are run all the same."""
        failed = {trouble.case for trouble in self.outcome.troubles if trouble.engine == block.engine.name}
        left = tuple(case for case in block.cases if case.name not in failed)
        while left and "prepare" not in failed and block.engine.name not in self.outcome.unavailable:
            try:
                self._run(replace(block, cases=left), progress)
                return
            except UnavailableError as error:
                self.outcome.unavailable[block.engine.name] = str(error)
            except CaseError as error:
                self.outcome.troubles.append(Trouble(block.engine.name, error.case, str(error)))
                names = [case.name for case in left]
                left = left[names.index(error.case) + 1 :] if error.case in names else ()

    def _run(self, block: Block, progress: Callable[[str], None]) -> None:
        engine = block.engine
        progress(block.label)
        given = self._options.get(engine.name, {})
        if engine.needs is not None and not given:
            raise UnavailableError(f"{engine.needs} was not given")
        python = sys.executable if engine.environment is None else python_of(engine.environment, engine.python)
        name = f"bench_{next(self._numbers)}"
        with self._servers.database(name) as url:
            options = {**engine.options, **given}
            config = Config(engine.name, url, self._servers.valkey.url, options)
            log = self._folder / f"{engine.name}.log"
            with client([python], engine.module, config, self._servers, log) as peer:
                settle = functools.partial(self._servers.settle, url)
                turn = Turns(block, peer, self._scale, self._counts, settle)
                for sample in turn.run(progress):
                    self.outcome.samples.append(sample)
                self.outcome.versions[engine.name] = turn.version


class Turns:
    """The cases of one block, one after the other."""

    def __init__(
        self,
        block: Block,
        peer: Client,
        scale: Scale,
        counts: dict[tuple[str, int, str], int],
        settle: Callable[[], None],
    ) -> None:
        self.block = block
        self.version = ""
        self._peer = peer
        self._scale = scale
        self._counts = counts
        self._settle = settle
        self._shapes: frozenset[str] = frozenset()
        self._modes: frozenset[str] = frozenset()
        self._submitted = 0
        self._overloaded = False

    def run(self, progress: Callable[[str], None]) -> Iterator[Sample]:
        """Run them, and yield what they measure."""
        able = self._attempt("prepare", self._peer.ask, "prepare")
        self.version, self._shapes, self._modes = able["version"], frozenset(able["shapes"]), frozenset(able["modes"])
        if self.block.finished:
            progress(f"{self.block.label}: filling the tables")
            self._attempt("prepare", self._peer.ask, "grow", finished=self.block.finished)
        for case in self.block.cases:
            if case.kind is Kind.SUBMIT and case.value in self._modes:
                progress(f"{self.block.label}: {case.title}")
                yield self._attempt(case.name, self._submit, case)
        progress(f"{self.block.label}: draining")
        yield from self._attempt("one-step", self._drain)
        for case in self.block.cases:
            if self._offered(case):
                progress(f"{self.block.label}: {case.title}")
                self._settle()
                sample = self._attempt(case.name, getattr(self, f"_{case.kind.name.lower()}"), case)
                if sample is not None:
                    yield sample

    def _offered(self, case: Case) -> bool:
        if case.kind in (Kind.SUBMIT, Kind.DRAIN, Kind.COLD_START):
            return False  # done by then
        if case.kind in (Kind.CHECKPOINTS, Kind.MEMORY):
            return self.block.engine.name == BYRD
        return case.shape.key in self._shapes

    def _attempt(self, case: str, do: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return do(*arguments, **named)
        except BenchmarkError as error:
            raise CaseError(case, str(error)) from None

    def _sample(self, case: str, metrics: dict[str, float], latencies_ms: Sequence[float] = ()) -> Sample:
        block = self.block
        return Sample(
            block.engine.name, case, block.round, metrics, block.processes, block.finished, tuple(latencies_ms)
        )

    def _submit(self, case: Case) -> Sample:
        count = self._scale.submits
        answer = self._peer.ask("submit", mode=case.value, count=count)
        self._submitted += count
        return self._sample(case.name, _rate(count, answer))

    def _drain(self) -> list[Sample]:
        names = {case.name for case in self.block.cases}
        wanted = int(self.block.engine.drain * self._scale.part) if "one-step" in names else _WARM_UP_RUNS
        if self._submitted < wanted:
            mode = "batch" if "batch" in self._modes else "one"
            self._peer.ask("submit", mode=mode, count=wanted - self._submitted)
        self._settle()
        answer = self._peer.ask("drain", processes=self.block.processes)
        found = []
        if "one-step" in names:
            found.append(self._sample("one-step", _rate(answer["runs"], answer)))
        if "cold-start" in names:
            found.append(self._sample("cold-start", {"seconds": answer["cold_start_seconds"]}))
        return found

    def _saturate(self, case: Case) -> Sample:
        key = (self.block.engine.name, self.block.processes, case.name)
        shape = asdict(case.shape)
        if case.first:  # so that every process has connected, and every statement was planned
            warm = self._peer.ask("saturate", shape=shape, count=case.first)
            self._counts.setdefault(key, max(case.least, int(case.first / warm["seconds"] * self._scale.seconds)))
        answer = self._peer.ask("saturate", shape=shape, count=self._counts.get(key, case.least))
        return self._sample(case.name, {**_rate(answer["steps"], answer), "submit_seconds": answer["submit_seconds"]})

    def _latency(self, case: Case) -> Sample:
        count = case.least if self._scale.part == 1 else max(1, case.least // 2)
        self._peer.ask("latency", shape=asdict(case.shape), count=3)
        return self._latencies(case, self._peer.ask("latency", shape=asdict(case.shape), count=count)["latencies"])

    def _load(self, case: Case) -> Sample | None:
        if self._overloaded or not isinstance(case.value, float):
            return None
        shape = asdict(case.shape)
        found = self._peer.ask("load", shape=shape, rate=case.value, seconds=self._scale.load_seconds)["latencies"]
        sample = self._latencies(case, found) if found else None
        self._overloaded = sample is None or sample.metrics["p50_ms"] > _OVERLOAD_MS
        return sample

    def _latencies(self, case: Case, seconds: Sequence[float]) -> Sample:
        taken = [1000 * each for each in seconds]
        return self._sample(case.name, {"p50_ms": percentile(taken, 50), "p99_ms": percentile(taken, 99)}, taken)

    def _checkpoints(self, case: Case) -> Sample:
        loops = self._peer.ask("checkpoints", items=_ITEMS, every=_EVERY)["loops"]
        return self._sample(case.name, {f"{name}_seconds": seconds for name, seconds in loops.items()})

    def _memory(self, case: Case) -> Sample:
        chains, metrics, done = asdict(case.shape), {}, 0
        for name, steps in (("early_mb", _EARLY_STEPS), ("later_mb", _LATER_STEPS)):
            self._peer.ask("saturate", shape=chains, count=(steps - done) // case.shape.size)
            metrics[name], done = self._peer.memory().child / _MB, steps
        return self._sample(case.name, metrics)

    def _resident(self, case: Case) -> Sample:
        memory = self._peer.memory()
        return self._sample(case.name, {"total_mb": memory.total / _MB, "child_mb": memory.child / _MB})


def _rate(steps: int, answer: dict[str, Any]) -> dict[str, float]:
    """Return how many steps a second were made, and what one took: milliseconds of the clock, and of CPUs."""
    cpu = {f"cpu_{name}_ms": 1000 * seconds / max(1, steps) for name, seconds in answer["cpu"].items()}
    seconds = max(answer["seconds"], 1e-6)
    return {"per_second": steps / seconds, "ms_per_step": 1000 * seconds / max(1, steps), "seconds": seconds, **cpu}
