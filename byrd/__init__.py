"""Byrd: durable workflows for Celery.

Adopt an app with ``engine = byrd.Byrd(app)``, then submit any canvas: ``engine.submit(chain(...))``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from byrd import errors
from byrd.engine import Byrd, Run, Workflow
from byrd.errors import LimitedError, RetryLater
from byrd.limits import Limit
from byrd.model import RunStatus, StepStatus
from byrd.policies import Retry, Timeouts
from byrd.task import CheckpointTask, DurableTask, Outcome, Progress, SagaTask
from byrd.waits import sleep, wait_for

try:
    __version__ = version("byrd")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Byrd",
    "CheckpointTask",
    "DurableTask",
    "Limit",
    "LimitedError",
    "Outcome",
    "Progress",
    "Retry",
    "RetryLater",
    "Run",
    "RunStatus",
    "SagaTask",
    "StepStatus",
    "Timeouts",
    "Workflow",
    "__version__",
    "errors",
    "sleep",
    "wait_for",
]
