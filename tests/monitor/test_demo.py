"""`make demo` keeps its promises, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(150)
def test_the_demo_survives_what_it_does_to_itself(tmp_path: Path) -> None:
    source = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "tasks.demo"]
    done = subprocess.run(command, cwd=tmp_path, env=source, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "promises were not kept" not in done.stdout
    [report] = [line for line in done.stdout.splitlines() if line.startswith("The report: ")]
    assert Path(report.removeprefix("The report: ").strip()).is_relative_to(tmp_path)
    assert [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)] == []
