"""Byrd: durable workflows for Celery.

Adopt an app with ``engine = byrd.Byrd(app)``, then submit any canvas: ``engine.submit(chain(...))``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from byrd import errors
from byrd.engine import Byrd, Run, Workflow
from byrd.errors import LimitedError, RetryLater
from byrd.items import each
from byrd.limits import Limit
from byrd.model import RunStatus, StepStatus
from byrd.policies import Retry, Timeouts
from byrd.sagas import NOT_DONE, saga
from byrd.task import CheckpointTask, Compensation, DurableTask, Outcome, Progress, SagaTask, current_compensation
from byrd.waits import sleep, wait_for

try:
    __version__ = version("byrd")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "NOT_DONE",
    "Byrd",
    "CheckpointTask",
    "Compensation",
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
    "current_compensation",
    "each",
    "errors",
    "saga",
    "sleep",
    "wait_for",
]
