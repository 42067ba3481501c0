"""Settings: what is said is meant, and what cannot be used is named."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from tasks.settings import SettingError, Settings, read_settings


def test_nothing_set_gives_the_defaults() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"MONITOR_TIMEOUT": "  ", "OTHER": "1"}) == Settings()


def test_everything_can_be_set() -> None:
    read = read_settings(
        {
            "MONITOR_CONTACT": "https://example.com/monitor",
            "MONITOR_MIN_INTERVAL": "0.5",
            "MONITOR_TIMEOUT": "3",
            "MONITOR_MAX_BYTES": "2000000",
            "MONITOR_ALLOWED_NETWORKS": "127.0.0.0/8, fc00::/7",
            "MONITOR_PARALLELISM": "2",
            "MONITOR_BATCH_SIZE": "5",
            "MONITOR_REPORTS": "out",
            "MONITOR_WEBHOOK_URL": "https://hooks.example/T0KEN",
            "MONITOR_WEBHOOK_SECRET": "s3cret",
            "MONITOR_MAIL_TO": "a@example.com",
            "MONITOR_MAIL_FROM": "b@example.com",
            "MONITOR_MAIL_FOLDER": "mail",
            "MONITOR_SMTP_URL": "smtps://u:p4ss@mail.example",
        }
    )
    assert read == Settings(
        contact="https://example.com/monitor",
        min_interval=0.5,
        timeout=3,
        max_bytes=2_000_000,
        allowed_networks=(ip_network("127.0.0.0/8"), ip_network("fc00::/7")),
        parallelism=2,
        batch_size=5,
        reports=Path("out"),
        webhook_url="https://hooks.example/T0KEN",
        webhook_secret="s3cret",
        mail_to="a@example.com",
        mail_from="b@example.com",
        mail_folder=Path("mail"),
        smtp_url="smtps://u:p4ss@mail.example",
    )
    assert not any(secret in repr(read) for secret in ("s3cret", "p4ss", "T0KEN"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("MONITOR_TIMEOUT", "soon"),
        ("MONITOR_TIMEOUT", "nan"),
        ("MONITOR_MIN_INTERVAL", "0"),
        ("MONITOR_MIN_INTERVAL", "inf"),
        ("MONITOR_BATCH_SIZE", "-1"),
        ("MONITOR_ALLOWED_NETWORKS", "localhost"),
        ("MONITOR_ALLOWED_NETWORKS", "10.0.0.1/8"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=name):
        read_settings({name: value})
