"""Notifiers are told of violations, in order, and none can harm another; the examples really mail and post."""

from __future__ import annotations

import asyncio
import json
import logging
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from safe_broadcaster import (
    AlertManager,
    AlertNotifier,
    ConfigError,
    ConnectionManager,
    EventBus,
    ViolationAcknowledged,
    ViolationCreated,
    WebSocketBroadcaster,
)
from test_docs import ROOT, load
from virtual import virtual

CREATED = ViolationCreated(characteristic_id=5, violation_id=7, rule_name="one beyond zone A")
SEEN = ViolationAcknowledged(violation_id=7, user="ada")


class Notifier(AlertNotifier):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        await asyncio.sleep(1)  # an acknowledgement must not overtake it
        self.told.append(event)

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        self.told.append(event)


class Broken(Notifier):
    async def notify_violation_created(self, event: ViolationCreated) -> None:
        raise OSError("no mail server")

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        await asyncio.get_running_loop().create_future()


async def raise_and_see(alerts: AlertManager) -> None:
    await alerts.notify_violation_created(CREATED)
    await alerts.notify_violation_acknowledged(SEEN)
    assert await alerts.event_bus.drain()


@virtual
async def test_every_notifier_is_told_in_order_whatever_the_others_do(caplog) -> None:
    alerts, good, broken = AlertManager(), Notifier(), Broken()
    for notifier in (broken, good, good):
        alerts.add_notifier(notifier)
    assert alerts.notifiers == (broken, good)
    await raise_and_see(alerts)
    assert good.told == [CREATED, SEEN]
    assert "OSError: no mail server" in caplog.text
    assert "notify_violation_acknowledged did not return within 30.0 s" in caplog.text


@virtual
async def test_a_removed_notifier_is_told_no_more() -> None:
    alerts, notifier = AlertManager(), Notifier()
    alerts.add_notifier(notifier)
    assert alerts.remove_notifier(notifier) is True
    assert alerts.remove_notifier(notifier) is False
    await raise_and_see(alerts)
    assert (notifier.told, alerts.notifiers) == ([], ())


@virtual
async def test_a_manager_is_itself_a_notifier() -> None:
    inner, outer, notifier = AlertManager(), AlertManager(), Notifier()
    inner.add_notifier(notifier)
    outer.add_notifier(inner)
    await raise_and_see(outer)
    await inner.event_bus.drain()
    assert notifier.told == [CREATED, SEEN]


@pytest.mark.parametrize("same_bus", [True, False])
def test_a_broadcaster_is_a_notifier_and_sends_once_also_if_it_listens_already(same_bus) -> None:
    @virtual
    async def main() -> None:
        bus = EventBus()
        manager = ConnectionManager()
        broadcaster = WebSocketBroadcaster(manager, bus)
        alerts = AlertManager(bus if same_bus else None)
        assert isinstance(broadcaster, AlertNotifier)
        alerts.add_notifier(broadcaster)
        await raise_and_see(alerts)
        assert manager.get_stats()["broadcasts"] == 2

    main()


@pytest.mark.parametrize("wrong", [7, object(), Notifier, print])
def test_what_is_no_notifier_is_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=r"notifier=.* is not allowed: give an object with notify_violation_created"):
        AlertManager().add_notifier(wrong)


class MailServer(socketserver.StreamRequestHandler):
    """As much of SMTP (RFC 5321) as a client needs to get rid of a mail."""

    mails: list[str]

    def handle(self) -> None:
        self.wfile.write(b"220 test\r\n")
        while line := self.rfile.readline():
            if line[:4].upper() == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                mail = []
                while (line := self.rfile.readline()) != b".\r\n":
                    mail.append(line.decode())
                self.mails.append("".join(mail))
            self.wfile.write(b"221 bye\r\n" if line[:4].upper() == b"QUIT" else b"250 ok\r\n")


class Webhook(BaseHTTPRequestHandler):
    posts: list[dict]

    def do_POST(self) -> None:
        self.posts.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_) -> None:
        """Say nothing."""


async def test_the_examples_mail_and_post_each_alert(caplog) -> None:
    caplog.set_level(logging.WARNING)
    MailServer.mails, Webhook.posts = [], []
    servers = [socketserver.ThreadingTCPServer(("127.0.0.1", 0), MailServer), HTTPServer(("127.0.0.1", 0), Webhook)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        mail, webhook = (server.server_address[1] for server in servers)
        example = load(ROOT / "examples/notifiers.py")
        await example.main(f"smtp://127.0.0.1:{mail}/ops@example.org", f"http://127.0.0.1:{webhook}/alerts")
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
    assert caplog.records == []
    first, second = MailServer.mails
    assert "Subject: [warning] violation 7: one beyond zone A" in first
    assert "Subject: violation 7 was seen by ada" in second
    assert "To: ops@example.org" in first
    assert [post["event"] for post in Webhook.posts] == ["violation.created", "violation.acknowledged"]
    assert Webhook.posts[0]["data"]["characteristic_id"] == 5
