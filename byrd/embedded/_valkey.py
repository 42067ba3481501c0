"""The embedded Valkey (or Redis) server."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from byrd.embedded._binaries import Binary, find_valkey
from byrd.embedded._process import HOST
from byrd.embedded._server import EmbeddedServer
from byrd.embedded._user import give


class EmbeddedValkey(EmbeddedServer):
    """Valkey on the loopback address.

    Args:
        data_dir: kept for the next start; None means a temporary folder, removed at the end.
        port: None means a free one, which stays the same for every start of this object.
        persistence: append every write to a log, flushed each second. Without it, a stop or a kill loses all data.

    """

    kind = "valkey"
    label = "Valkey"
    _stop_signal = signal.SIGTERM

    def __init__(self, data_dir: Path | None = None, *, port: int | None = None, persistence: bool = True) -> None:
        super().__init__(data_dir, port=port)
        self._persistence = persistence
        self._binary: Binary | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _prepare(self) -> None:
        self._binary = self._binary or find_valkey(self._user)
        self._store.mkdir(mode=0o700, exist_ok=True)
        give(self._store, self._user)

    def _command(self, port: int) -> Sequence[str | Path]:
        if self._binary is None:
            raise AssertionError("_prepare comes first")
        options = {
            "bind": HOST,
            "port": str(port),
            "dir": "./",  # where it is started; older servers cannot take a path with spaces here
            "daemonize": "no",
            "appendonly": "yes" if self._persistence else "no",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",  # an evicted message would be a lost one
        }
        return [self._binary.path, *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _answers(self, pid: int, port: int) -> bool:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        client = redis.Redis(HOST, port, socket_timeout=0.5, retry=Retry(NoBackoff(), 0))
        try:
            with client:
                info = client.info()  # PING is not enough: another server may answer, or this one while it loads
        except redis.RedisError:
            return False
        return bool(info["process_id"] == pid and info["loading"] == 0)
