"""The monitor's settings, read once from the environment; every name starts with MONITOR_."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

Network = IPv4Network | IPv6Network


class SettingError(Exception):
    """A setting cannot be used; the message names it and says what it should be."""


@dataclass(frozen=True)
class Settings:
    """Seconds for every interval and time-out, bytes for every size."""

    contact: str = ""
    """An address or a link for those whose site is read; part of the User-Agent."""
    min_interval: float = 1.0
    """Between two requests to one host, over all workers; a longer Crawl-delay in robots.txt wins."""
    timeout: float = 20.0
    """For one answer."""
    max_bytes: int = 5_000_000
    allowed_networks: tuple[Network, ...] = ()
    """Addresses that are not public and may be read all the same, such as 127.0.0.0/8 for the demo."""
    parallelism: int = 4
    batch_size: int = 20
    reports: Path = Path("reports")
    """Where the HTML reports are written."""
    webhook_url: str = field(default="", repr=False)
    webhook_secret: str = field(default="", repr=False)
    """Signs the webhook's body; empty sends it unsigned."""
    mail_to: str = ""
    mail_from: str = "byrd-monitor@localhost"
    mail_folder: Path | None = None
    """Mail is written here as .eml files."""
    smtp_url: str = field(default="", repr=False)
    """smtp://[user:password@]host[:port], or smtps:// for TLS from the first byte."""

    @property
    def user_agent(self) -> str:
        return f"{ROBOTS_AGENT}/0.1" + (f" (+{self.contact})" if self.contact else "")


ROBOTS_AGENT = "ByrdMonitor"
"""The name that robots.txt files may address."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Raises SettingError for a value that cannot be used."""
    env = {name: value.strip() for name, value in environ.items() if name.startswith("MONITOR_") and value.strip()}
    default = Settings()
    return Settings(
        contact=env.get("MONITOR_CONTACT", ""),
        min_interval=_number(env, "MONITOR_MIN_INTERVAL", default.min_interval, least=0.01),
        timeout=_number(env, "MONITOR_TIMEOUT", default.timeout, least=0.1),
        max_bytes=int(_number(env, "MONITOR_MAX_BYTES", default.max_bytes, least=1_000)),
        allowed_networks=_networks(env.get("MONITOR_ALLOWED_NETWORKS", "")),
        parallelism=int(_number(env, "MONITOR_PARALLELISM", default.parallelism, least=1)),
        batch_size=int(_number(env, "MONITOR_BATCH_SIZE", default.batch_size, least=1)),
        reports=Path(env.get("MONITOR_REPORTS", default.reports)),
        webhook_url=env.get("MONITOR_WEBHOOK_URL", ""),
        webhook_secret=env.get("MONITOR_WEBHOOK_SECRET", ""),
        mail_to=env.get("MONITOR_MAIL_TO", ""),
        mail_from=env.get("MONITOR_MAIL_FROM", default.mail_from),
        mail_folder=Path(env["MONITOR_MAIL_FOLDER"]) if "MONITOR_MAIL_FOLDER" in env else None,
        smtp_url=env.get("MONITOR_SMTP_URL", ""),
    )


@cache
def settings() -> Settings:
    """The settings of this process."""
    return read_settings(os.environ)


def _number(env: Mapping[str, str], name: str, default: float, *, least: float) -> float:
    try:
        value = float(env.get(name, default))
    except ValueError:
        raise SettingError(f"{name} must be a number, not {env[name]!r}.") from None
    if not least <= value < float("inf"):
        raise SettingError(f"{name} must be at least {least:g}, not {value:g}.")
    return value


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise SettingError(
            f"MONITOR_ALLOWED_NETWORKS must be networks such as 127.0.0.0/8, separated by commas: {error}."
        ) from None
