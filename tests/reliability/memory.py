"""A control group with little memory, in which the kernel ends a process that takes more (Linux, as root).

It is made below the group that the tests run in, so whatever limits they have go on to hold.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import wait_until


@dataclass(frozen=True)
class MemoryGroup:
    """A control group.  ``version``: of the kernel's interface, 1 or 2."""

    path: Path
    version: int

    def limit(self, megabytes: int) -> None:
        """Give it so much memory, and no swap: what its processes had before they came does not count."""
        size = str(megabytes * 2**20)
        limits = {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size}  # memory, memory and swap
        if self.version == 2:
            limits = {"memory.max": size, "memory.swap.max": "0"}
        for name, value in limits.items():
            if (self.path / name).exists():  # a kernel may count no swap
                (self.path / name).write_text(value)

    def add(self, *pids: int) -> None:
        """Move processes into it; those that they start later are born there."""
        for pid in pids:
            (self.path / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How many of its processes the kernel has ended for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        found = dict(line.split() for line in (self.path / name).read_text().splitlines())
        return int(found["oom_kill"])

    def _end(self) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

        def removed() -> bool:
            with contextlib.suppress(OSError):  # it is busy until they are gone
                self.path.rmdir()
            return not self.path.exists()

        wait_until(removed)


class NoMemoryGroupError(Exception):
    """No such group can be made here."""


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Have a group; the processes that are in it at the end are killed.

    Raises :class:`NoMemoryGroupError`, which says why there can be none.
    """
    if sys.platform != "linux":
        raise NoMemoryGroupError("control groups are Linux's")
    if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
        raise NoMemoryGroupError("this machine stops when a control group has no memory left")
    parent, version = _parent()
    group = MemoryGroup(parent / f"byrd-{secrets.token_hex(4)}", version)
    try:
        group.path.mkdir()
    except OSError as exc:
        raise NoMemoryGroupError(f"no control group can be made here: {exc}") from exc
    try:
        yield group
    finally:
        group._end()


def _parent() -> tuple[Path, int]:
    """Return the group to make one in: our own with version 1, the next above that may hand memory on with 2."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    if "memory" in own:
        for _, where, kind, options, *_ in mounts:
            if kind == "cgroup" and "memory" in options.split(","):
                return Path(where + own["memory"]), 1
    for _, where, kind, *_ in mounts:
        path = Path(where + own.get("", "/"))
        while kind == "cgroup2" and path.is_relative_to(where):
            control = path / "cgroup.subtree_control"
            if control.exists() and "memory" in control.read_text().split():
                return path, 2
            path = path.parent
    raise NoMemoryGroupError("no control group here hands memory on to groups within it")
