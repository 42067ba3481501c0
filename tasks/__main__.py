"""`python -m tasks`: which competitors are watched. Checks themselves are runs: `byrd submit monitor.check 1`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click
from sqlalchemy import Connection

from tasks import store
from tasks.fetch import AddressRefusedError, check_address
from tasks.schema import create_tables


@click.group()
def main() -> None:
    """The competitor monitor."""


@main.command()
@click.argument("name")
@click.argument("url")
def register(name: str, url: str) -> None:
    """Watch the site at URL, or the part of it below URL's path."""
    try:
        check_address(url)
    except AddressRefusedError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    with _connection() as connection:
        competitor_id = store.register_competitor(connection, name=name, base_url=url)
    click.echo(f"{name} is competitor {competitor_id}. To look at it: byrd submit monitor.check {competitor_id}")


@main.command(name="list")
def list_() -> None:
    """Show the competitors that are watched."""
    with _connection() as connection:
        for competitor in store.list_competitors(connection):
            click.echo(f"{competitor.id:>6}  {competitor.name}  {competitor.base_url}")


@contextmanager
def _connection() -> Iterator[Connection]:
    url = os.environ.get("BYRD_DATABASE_URL")
    if not url:
        raise click.UsageError("BYRD_DATABASE_URL must name the Postgres database: postgresql://...")
    with store.open_database(url) as database, database.begin() as connection:
        create_tables(connection)
        yield connection


if __name__ == "__main__":
    main()
