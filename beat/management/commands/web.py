"""``web``: serves the admin with gunicorn."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser
from django.db import connections
from gunicorn.app.base import BaseApplication

from beat.workflows import load_celery_app
from beat.wsgi import application


class Server(BaseApplication):
    """gunicorn, configured by this project and not by its own command line."""

    def __init__(self, bind: str) -> None:
        self.bind = bind
        super().__init__()

    def load_config(self) -> None:
        self.cfg.set("bind", self.bind)
        self.cfg.set("threads", 8)  # and one process: an admin has few users
        self.cfg.set("worker_class", "gthread")
        self.cfg.set("proc_name", "byrd web")
        if "control_socket_disable" in self.cfg.settings:  # gunicorn 25 opens one in the home folder otherwise
            self.cfg.set("control_socket_disable", True)

    def load(self) -> Any:
        if (app := load_celery_app()) is not None:
            app.set_default()  # django-celery-beat's admin lists the tasks of the current app
        return application


class Command(BaseCommand):
    help = "Serve the admin of schedules."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--bind", default=settings.BYRD_WEB_BIND, help="host:port (default: %(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"Schedules are at http://{options['bind']}/")
        connections.close_all()  # gunicorn forks, and a connection cannot be shared
        Server(options["bind"]).run()
