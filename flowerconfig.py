"""Flower's settings: it listens on loopback unless FLOWER_ADDRESS says otherwise, and shows runs beside steps.

Flower can revoke tasks and stop workers, and asks nobody who they are.  Before it listens anywhere else, set
FLOWER_BASIC_AUTH=user:password, or one of its OAuth providers (see Flower's documentation, "Authentication").
"""

from __future__ import annotations

import os

address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
port = int(os.environ.get("FLOWER_PORT", "5555"))

# The arguments of a step are read in Postgres: what its message shows in their place is its run and its number there.
tasks_columns = "name,state,args,kwargs,result,exception,received,runtime,worker,uuid"

# Steps that ended long ago are in Postgres; what is kept here is memory.
max_tasks = 10_000
purge_offline_workers = 3600
