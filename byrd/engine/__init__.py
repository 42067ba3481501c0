"""What app code calls: adopt an app, submit canvases and workflows, follow and steer runs."""

from __future__ import annotations

from byrd.engine.engine import Byrd
from byrd.engine.run import Run
from byrd.engine.workflow import Workflow

__all__ = ["Byrd", "Run", "Workflow"]
