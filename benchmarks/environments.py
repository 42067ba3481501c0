"""The peers' own environments: made once below ``.bench/``, with pinned versions, by pip as it is set up here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.errors import UnavailableError
from benchmarks.peers.protocol import ROOT

FOLDER = ROOT / ".bench"
REQUIREMENTS = ROOT / "benchmarks" / "requirements"
_STAMP = ".installed"
_INSTALL_SECONDS = 600
#: The newest that is tried where a peer asks for a newer Python than Byrd's.
_MINORS = range(14, 10, -1)


@cache
def python_of(name: str, least: tuple[int, int]) -> str:
    """Return the Python of an environment, made now if it is not there or its requirements have changed.

    Raises :class:`UnavailableError` when it cannot be made.
    """
    wanted = (REQUIREMENTS / f"{name}.txt").read_text()
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    _run([_base_python(least), "-m", "venv", str(folder)])
    requirements = ["--requirement", str(REQUIREMENTS / f"{name}.txt")]
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    stamp.write_text(wanted)
    return str(python)


def _base_python(least: tuple[int, int]) -> str:
    if sys.version_info[:2] >= least:
        return sys.executable
    for python in _candidates():
        code = f"import ensurepip, sys; sys.exit(sys.version_info < {least})"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    raise UnavailableError(f"needs Python {least[0]}.{least[1]} or newer; BENCHMARKS_PYTHON may name one")


def _candidates() -> Iterator[str]:
    """Name the Pythons that there may be: the one that was given, those on PATH, those of pyenv."""
    if given := os.environ.get("BENCHMARKS_PYTHON"):
        yield given
    for minor in _MINORS:
        if found := shutil.which(f"python3.{minor}"):
            yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(python) for python in sorted(root.glob("versions/3.*/bin/python"), reverse=True))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"cannot be installed: {error}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UnavailableError(f"cannot be installed: {' '.join(last)}")
