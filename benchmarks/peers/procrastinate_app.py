"""The app that Procrastinate's workers load."""

from __future__ import annotations

from procrastinate import App, PsycopgConnector

from benchmarks.peers.protocol import Config

NAME = "step"
#: Jobs that a process runs at a time.
CONCURRENCY = 32

app = App(connector=PsycopgConnector(conninfo=Config.from_environment().postgres_url))


@app.task(name=NAME)
async def step(value: int) -> int:
    """Return what it got."""
    return value
