"""A folder of things that are slow to make and may be deleted at any time: empty clusters, readable binaries."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cached folder `key`, filled by `build` the first time; raise OSError where nothing can be cached."""
    cache = _cache_folder()
    target = cache / key
    if target.is_dir():
        return target
    lock = os.open(cache / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if not flock_within(lock, 60.0):
            raise TimeoutError(f"{cache} is locked by another process.")
        if not target.is_dir():
            remove_leftovers(cache, "new-")
            staging = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
            build(staging)
            staging.rename(target)  # named when complete, so a killed build is never taken for a good one
    finally:
        os.close(lock)
    return target


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Delete what killed processes left unfinished in `folder`; the caller holds its lock."""
    for leftover in folder.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # an initdb whose starter was killed may still be writing there


def flock_within(file: int, seconds: float) -> bool:
    """Lock an open file for us alone; False if another process still holds it after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


def _cache_folder() -> Path:
    folder = _cache_location()
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others, so what is in it is not to be run.")
    return folder


def _cache_location() -> Path:
    if named := os.environ.get("BYRD_CACHE_DIR"):
        return Path(named).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/byrd")  # root's own home cannot be read by the user that root runs Postgres as
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser().absolute() / "byrd"
    except RuntimeError as error:
        raise FileNotFoundError("This user has no home folder.") from error
