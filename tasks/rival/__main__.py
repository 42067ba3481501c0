"""`python -m tasks.rival`: the rival's site, to look at in a browser or to point a monitor at."""

import threading

import click

from tasks.rival import RivalServer


@click.command()
@click.option("--port", default=8800, show_default=True)
@click.option("--version", default=1, show_default=True, type=click.IntRange(1, 2))
@click.option("--crawl-delay", default=0.1, show_default=True, help="Seconds, as robots.txt asks for.")
def main(port: int, version: int, crawl_delay: float) -> None:
    """Serve the rival's web site on loopback until Ctrl-C."""
    with RivalServer(port=port, version=version, crawl_delay=crawl_delay) as server:
        click.echo(f"The rival's site, version {version}: {server.url}")
        click.echo(f"""Switch: curl -d '{{"version": 2}}' {server.url}/_admin/version""")
        threading.Event().wait()


if __name__ == "__main__":
    main()
