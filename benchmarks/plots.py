"""Draws a comparison's JSON: ``python benchmarks/plots.py FIGURES.json FOLDER``, in an environment that has matplotlib.

Each point is a median over the rounds; bars reach from the smallest to the largest.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

Sample = dict[str, Any]
#: The x value of a sample, or None if it does not belong to the plot.
Place = Callable[[Sample], float | None]


def _numbered(prefix: str) -> Place:
    """Return the number in the names of cases such as ``chord-100``, with the usual processes and empty tables."""

    def place(sample: Sample) -> float | None:
        found = re.fullmatch(rf"{prefix}-(\d+)", sample["case"])
        return float(found[1]) if found and sample["finished"] == 0 and sample["usual"] else None

    return place


def _grown(case: str, field: str) -> Place:
    """Return one of the fields by which a case grows."""

    def place(sample: Sample) -> float | None:
        others = sample["usual"] if field == "finished" else sample["finished"] == 0
        return float(sample[field]) if sample["case"] == case and others else None

    return place


@dataclass(frozen=True)
class Plot:
    """What is drawn: a metric over what ``place`` returns; ``scale`` is the x axis's."""

    name: str
    place: Place
    metric: str
    title: str
    x_title: str
    y_title: str
    scale: str = "linear"


_LOAD, _RATE = "chains of 3 submitted a second", "steps a second"
PLOTS = (
    Plot("latency-p50", _numbered("load"), "p50_ms", "Submit to end, half of them", _LOAD, "p50, ms", "log"),
    Plot("latency-p99", _numbered("load"), "p99_ms", "Submit to end, the slowest of 100", _LOAD, "p99, ms", "log"),
    Plot("width", _numbered("chord"), "per_second", "Chords", "members of a chord", _RATE, "log"),
    Plot("length", _numbered("chain"), "per_second", "Chains", "steps in a chain", _RATE),
    Plot("processes", _grown("chain-10", "processes"), "per_second", "Chains of 10", "processes", _RATE),
    Plot(
        "tables", _grown("chain-10", "finished"), "per_second", "Chains of 10", "runs that have ended", _RATE, "symlog"
    ),
)


def draw(figures: dict[str, Any], wanted: Plot, file: Path) -> bool:
    """Draw one line an engine; return False when there are not two points for any."""
    metric = wanted.metric
    lines: dict[str, dict[float, list[float]]] = {}
    for sample in figures["samples"]:
        x = wanted.place(sample)
        if x is not None and metric in sample["metrics"]:
            lines.setdefault(sample["engine"], {}).setdefault(x, []).append(sample["metrics"][metric])
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    colours = {name: f"C{number}" for number, name in enumerate(sorted(figures["engines"]))}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        xs = sorted(points)
        middle = [median(points[x]) for x in xs]
        low = [at - min(points[x]) for at, x in zip(middle, xs, strict=True)]
        high = [max(points[x]) - at for at, x in zip(middle, xs, strict=True)]
        own = name == "byrd"
        style = {"color": colours[name], "linewidth": 2.5 if own else 1.2, "zorder": 3 if own else 2}
        axes.errorbar(xs, middle, [low, high], label=figures["engines"][name]["title"], marker="o", capsize=3, **style)
    axes.set_xscale(wanted.scale)
    every = sorted({x for points in lines.values() for x in points})
    axes.set_xticks(every, [f"{x:,.0f}" for x in every])
    axes.minorticks_off()
    axes.set_ylim(bottom=0) if metric == "per_second" else axes.set_yscale("log")
    axes.set(title=wanted.title, xlabel=wanted.x_title, ylabel=wanted.y_title)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return True


def main() -> None:
    """Draw all plots that there are samples for, and name their files."""
    source, folder = map(Path, sys.argv[1:])
    figures = json.loads(source.read_text())
    for sample in figures["samples"]:
        sample["usual"] = sample["processes"] == figures["settings"]["processes"]
    folder.mkdir(parents=True, exist_ok=True)
    for wanted in PLOTS:
        file = folder / f"{wanted.name}.svg"
        if draw(figures, wanted, file):
            print(file)


if __name__ == "__main__":
    main()
