"""Tells people and programs about a report: a signed webhook, mail over SMTP, or mail as an .eml file.

Each may be done twice, when a worker dies between the deed and its record. So each carries a key that stays the same:
the webhook an Idempotency-Key, the mail its Message-ID and its file name.
"""

import hashlib
import hmac
import json
import os
import smtplib
import ssl
import time
from collections.abc import Mapping
from datetime import datetime
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import httpx
from sqlalchemy import Engine

from tasks import store
from tasks.settings import Settings

_TIMEOUT = 15.0
SIGNATURE_AGE = 300.0
"""Seconds for which a signature is good."""


class DispatchError(Exception):
    """The report did not reach its receiver; the message says why. Trying again is safe."""


def channels(settings: Settings) -> list[str]:
    """The channels that the settings name."""
    named = {
        "webhook": bool(settings.webhook_url),
        "mail_file": settings.mail_folder is not None,
        "smtp": bool(settings.smtp_url and settings.mail_to),
    }
    return [channel for channel, is_named in named.items() if is_named]


def notify(database: Engine, settings: Settings, run_id: UUID, channel: str) -> str:
    """Tell one channel of a run's report, write down that it was told, and return where the message went."""
    with database.connect() as connection:
        report = store.load_report(connection, run_id)
        check = store.check_summary(connection, run_id)
    key = f"monitor-{run_id}"
    if channel == "webhook":
        post_webhook(settings.webhook_url, report.summary, key=key, secret=settings.webhook_secret)
        target = _shown(settings.webhook_url)
    else:
        mail = compose_mail(
            sender=settings.mail_from,
            to=settings.mail_to or settings.mail_from,
            subject=f"{check.competitor.name}: {report.text.splitlines()[0]}",
            text=report.text,
            html=report.html,
            file_name=f"{check.started_at:%Y-%m-%d}-report.html",
            key=key,
            moment=check.started_at,
        )
        if channel == "smtp":
            send_mail(mail, settings.smtp_url)
            target = settings.mail_to
        else:
            target = str(write_mail(mail, settings.mail_folder or settings.reports, key=key))
    with database.begin() as connection:
        store.record_notification(connection, run_id, channel=channel, target=target)
    return target


def post_webhook(url: str, payload: Mapping[str, Any], *, key: str, secret: str = "") -> int:
    """POST the payload as JSON; returns the status, which is a 2xx. With a secret, the body is signed."""
    body = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    if secret:
        headers["Byrd-Signature"] = sign(body, secret, moment=int(time.time()))
    try:
        response = httpx.post(url, content=body, headers=headers, timeout=_TIMEOUT, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DispatchError(f"The webhook at {_shown(url)} could not be called: {error}") from error
    if not response.is_success:
        raise DispatchError(f"The webhook at {_shown(url)} answered {response.status_code}.")
    return response.status_code


def sign(body: bytes, secret: str, *, moment: int) -> str:
    """`t=<seconds>,v1=<hex>`: an HMAC-SHA256 of the time and the body, so that an old request cannot be replayed."""
    digest = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={digest}"


def is_signed(body: bytes, signature: str, secret: str, *, now: float) -> bool:
    """What a receiver does with the Byrd-Signature header."""
    moment = signature.removeprefix("t=").partition(",")[0]
    if not (moment.isascii() and moment.isdigit() and len(moment) < 16) or abs(now - int(moment)) > SIGNATURE_AGE:
        return False
    return hmac.compare_digest(signature.encode(), sign(body, secret, moment=int(moment)).encode())


def compose_mail(
    *, sender: str, to: str, subject: str, text: str, html: str, file_name: str, key: str, moment: datetime
) -> EmailMessage:
    """A short text, with the report attached: mail programs show an attachment as it was meant."""
    message = EmailMessage()
    message["From"] = sender
    message["To"] = to
    message["Subject"] = " ".join(subject.split())
    message["Date"] = format_datetime(moment)
    message["Message-ID"] = f"<{key}@byrd.invalid>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text)
    message.add_attachment(html, subtype="html", filename=file_name)
    return message


def write_mail(message: EmailMessage, folder: Path, *, key: str) -> Path:
    """Write the mail as `<key>.eml`: all of it or nothing."""
    return write_file(folder / f"{key}.eml", bytes(message))


def write_file(path: Path, content: bytes) -> Path:
    """Replace the file in one step, so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path.resolve()


def send_mail(message: EmailMessage, smtp_url: str) -> None:
    """`smtp://[user:password@]host[:port]` upgrades to TLS before it logs in; `smtps://` is TLS from the first byte."""
    parts = urlsplit(smtp_url)
    if parts.scheme not in {"smtp", "smtps"} or not parts.hostname:
        raise DispatchError("MONITOR_SMTP_URL must be smtp://host or smtps://host.")
    try:
        with _connect(parts.scheme, parts.hostname, parts.port) as server:
            if parts.username:
                if parts.scheme == "smtp":
                    server.starttls(context=ssl.create_default_context())
                server.login(unquote(parts.username), unquote(parts.password or ""))
            server.send_message(message)
    except (smtplib.SMTPException, OSError) as error:
        raise DispatchError(f"Mail could not be sent by {parts.hostname}: {error}") from error


def _connect(scheme: str, host: str, port: int | None) -> smtplib.SMTP:
    if scheme == "smtps":
        return smtplib.SMTP_SSL(host, port or 465, timeout=_TIMEOUT, context=ssl.create_default_context())
    return smtplib.SMTP(host, port or 25, timeout=_TIMEOUT)


def _shown(url: str) -> str:
    """The address without its path and query, which often hold a secret."""
    return urlsplit(url).hostname or "an address without a host"
