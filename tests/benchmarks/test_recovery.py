"""The figures of recovery are kept, with Byrd's default settings: one trial each, in three times the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("benchmark", ["recovery_workers", "recovery_servers", "recovery_beat"])
def test_work_goes_on_soon_enough(benchmark: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--trials", "1", "--tolerate", "3"],
        cwd=_ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_figure_that_is_missed_is_a_failure() -> None:
    from click import ClickException

    from benchmarks.recovery_servers import judge

    judge({"a fault": (5.0, [1.0, 9.9])}, 2.0)
    with pytest.raises(ClickException, match=r"a fault: 9\.90 s"):
        judge({"a fault": (5.0, [1.0, 9.9])}, 1.0)
