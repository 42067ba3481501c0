"""The command line: ``byrd ...``, and the same as ``celery -A <app> byrd ...``."""

from __future__ import annotations

import click

from byrd.cli import chaos, dev, limits, metrics, runs, setup, waits
from byrd.cli.session import Session

__all__ = ["main"]


@click.group(name="byrd", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-A", "--app", "app_name", metavar="MODULE[:ATTR]", help="The Celery app  [env: BYRD_APP]")
@click.version_option(package_name="byrd", prog_name="byrd")
@click.pass_context
def main(ctx: click.Context, app_name: str | None) -> None:
    """Durable workflows for Celery.

    Byrd finds its servers in BYRD_DATABASE_URL and BYRD_BROKER_URL; `byrd dev` starts some for development.
    """
    # Under `celery -A shop byrd ...`, Celery's own context has the app already.
    ctx.obj = Session(app_name, getattr(ctx.obj, "app", None))


dev.add_to(main)
setup.add_to(main)
runs.add_to(main)
waits.add_to(main)
limits.add_to(main)
metrics.add_to(main)
chaos.add_to(main)
