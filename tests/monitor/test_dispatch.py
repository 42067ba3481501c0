"""Telling people and programs: signed, repeatable, and without giving secrets away."""

import email
import email.policy
import logging
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select

from tasks import check, dispatch, store
from tasks.dispatch import DispatchError, compose_mail, is_signed, post_webhook, send_mail, sign, write_mail
from tasks.fetch import Fetcher
from tasks.rival import RivalServer
from tasks.schema import notifications
from tasks.settings import Settings
from tests.monitor.web import LOOPBACK, Scripted


def mail(**overrides: str) -> EmailMessage:
    values = {
        "sender": "monitor@example.com",
        "to": "team@example.com",
        "subject": "Corvane: 5 pages changed",
        "text": "Five pages.\n",
        "html": "<h1>Größer → 59 €</h1>",
        "file_name": "report.html",
        "key": "monitor-1",
    }
    return compose_mail(**{**values, **overrides}, moment=datetime(2026, 11, 23, tzinfo=UTC))


def test_a_webhook_is_signed_and_carries_its_key(web: Scripted) -> None:
    web.answers["/hook"] = (204, {}, b"")
    assert post_webhook(f"{web.url}/hook", {"what": "größer"}, key="run-1", secret="s3cret") == 204
    [request] = web.requests
    assert request.json == {"what": "größer"}
    assert request.headers["Idempotency-Key"] == "run-1"
    signature = request.headers["Byrd-Signature"]
    assert is_signed(request.body, signature, "s3cret", now=time.time())
    assert not is_signed(request.body + b" ", signature, "s3cret", now=time.time())
    assert not is_signed(request.body, signature, "other", now=time.time())
    assert not is_signed(request.body, signature, "s3cret", now=time.time() + 301)


@pytest.mark.parametrize("signature", ["", "t=", "t=1", "t=²,v1=0", "v1=00", "t=" + "9" * 5000, "t=1,v1=ä"])
def test_a_malformed_signature_is_refused(signature: str) -> None:
    assert not is_signed(b"", signature, "secret", now=1.0)
    assert is_signed(b"", sign(b"", "secret", moment=1), "secret", now=1.0)


def test_a_receiver_that_refuses_is_an_error_without_its_address(web: Scripted) -> None:
    web.answers["/T0KEN"] = (500, {}, b"")
    for url, words in [(f"{web.url}/T0KEN", "answered 500"), ("http://127.0.0.1:9/T0KEN", "could not be called")]:
        with pytest.raises(DispatchError, match=words) as caught:
            post_webhook(url, {}, key="k")
        assert "T0KEN" not in str(caught.value)


def test_mail_holds_the_report(tmp_path: Path) -> None:
    path = write_mail(mail(), tmp_path / "new" / "folder", key="monitor-1")
    assert path.name == "monitor-1.eml"
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    assert message["Message-ID"] == "<monitor-1@byrd.invalid>"
    [attachment] = message.iter_attachments()
    assert attachment.get_filename() == "report.html"
    assert attachment.get_content().strip() == "<h1>Größer → 59 €</h1>"
    assert write_mail(mail(), path.parent, key="monitor-1") == path
    assert [file.name for file in path.parent.iterdir()] == ["monitor-1.eml"]


def test_a_subject_cannot_add_headers() -> None:
    assert mail(subject="Corvane\r\nBcc: all@example.com")["Subject"] == "Corvane Bcc: all@example.com"


class SmtpHandler(socketserver.StreamRequestHandler):
    """Enough of RFC 5321 to take a mail."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            command = line[:4].upper().strip()
            if command == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                received = []
                while (line := self.rfile.readline()) != b".\r\n":
                    received.append(line)
                getattr(self.server, "mails").append(b"".join(received))  # noqa: B009 - not an attribute of every server
            self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 ok\r\n")
            if command == b"QUIT":
                return


@contextmanager
def smtp_server() -> Iterator[tuple[str, list[bytes]]]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), SmtpHandler) as server:
        mails: list[bytes] = []
        setattr(server, "mails", mails)  # noqa: B010
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"smtp://127.0.0.1:{server.server_address[1]}", mails
        finally:
            server.shutdown()
            thread.join()


def test_mail_is_sent() -> None:
    with smtp_server() as (url, mails):
        send_mail(mail(), url)
    assert b"Subject: Corvane: 5 pages changed" in mails[0]


def test_a_password_never_travels_in_the_clear() -> None:
    with smtp_server() as (url, mails), pytest.raises(DispatchError, match="could not be sent") as caught:
        send_mail(mail(), url.replace("smtp://", "smtp://user:s3cret@"))
    assert mails == []
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://a", "smtp://", "a"])
def test_a_wrong_smtp_address_is_named(url: str) -> None:
    with pytest.raises(DispatchError, match="MONITOR_SMTP_URL"):
        send_mail(mail(), url)


def test_each_channel_is_told_and_remembered(
    database: Engine, rival: RivalServer, web: Scripted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = uuid4()
    with Fetcher(database, LOOPBACK) as fetcher:
        with database.begin() as connection:
            competitor = store.register_competitor(connection, name="Corvane", base_url=f"{rival.url}/pricing")
        check.discover(database, fetcher, run_id, competitor)
        with database.begin() as connection:
            check.conclude(connection, run_id)
    web.answers["/T0KEN"] = (200, {}, b"")
    settings = replace(LOOPBACK, webhook_url=f"{web.url}/T0KEN", mail_folder=tmp_path)
    assert dispatch.channels(settings) == ["webhook", "mail_file"]
    with caplog.at_level(logging.WARNING):
        for channel in dispatch.channels(settings):
            first = dispatch.notify(database, settings, run_id, channel)
            assert dispatch.notify(database, settings, run_id, channel) == first
    assert {request.headers["Idempotency-Key"] for request in web.requests} == {f"monitor-{run_id}"}
    assert [path.name for path in tmp_path.iterdir()] == [f"monitor-{run_id}.eml"]
    with database.connect() as connection:
        told = {row.channel: row.target for row in connection.execute(select(notifications))}
    assert told == {"webhook": "127.0.0.1", "mail_file": str(tmp_path / f"monitor-{run_id}.eml")}


def test_nothing_is_told_unless_a_setting_says_so() -> None:
    assert dispatch.channels(Settings()) == []
    assert dispatch.channels(Settings(smtp_url="smtp://a", mail_to="b@example.com")) == ["smtp"]
