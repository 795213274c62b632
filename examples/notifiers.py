"""Alerts by mail and to a webhook: two notifiers for an `AlertManager`, with nothing but the standard library.

    python examples/notifiers.py smtp://localhost:25/ops@example.org http://localhost:9000/alerts

What blocks is done in a thread; each notifier gets one event after the other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import smtplib
import sys
import urllib.request
from email.message import EmailMessage
from urllib.parse import urlsplit

from safe_broadcaster import AlertManager, ViolationAcknowledged, ViolationCreated

TIMEOUT = 10.0
"""Seconds that a server may take; what fails is logged, and the next alert follows."""


class EmailNotifier:
    """Sends a mail for each violation, and one when somebody has seen it."""

    def __init__(self, host: str, port: int, to: str, sender: str = "alerts@localhost") -> None:
        self.host = host
        self.port = port
        self.to = to
        self.sender = sender

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        """Mail a violation."""
        await asyncio.to_thread(
            self._mail, f"[{event.severity}] violation {event.violation_id}: {event.rule_name or 'no name'}", event
        )

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        """Mail that somebody has seen it."""
        await asyncio.to_thread(
            self._mail, f"violation {event.violation_id} was seen by {event.user or 'somebody'}", event
        )

    def _mail(self, subject: str, event: ViolationCreated | ViolationAcknowledged) -> None:
        mail = EmailMessage()
        mail["Subject"], mail["From"], mail["To"] = subject, self.sender, self.to
        mail.set_content(_as_json(event, indent=2))
        with smtplib.SMTP(self.host, self.port, timeout=TIMEOUT) as server:
            server.send_message(mail)


class WebhookNotifier:
    """Posts each alert as JSON."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def notify_violation_created(self, event: ViolationCreated) -> None:
        """Post a violation."""
        await asyncio.to_thread(self._post, "violation.created", event)

    async def notify_violation_acknowledged(self, event: ViolationAcknowledged) -> None:
        """Post that somebody has seen it."""
        await asyncio.to_thread(self._post, "violation.acknowledged", event)

    def _post(self, kind: str, event: ViolationCreated | ViolationAcknowledged) -> None:
        body = f'{{"event":"{kind}","data":{_as_json(event)}}}'.encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            pass


def _as_json(event: ViolationCreated | ViolationAcknowledged, indent: int | None = None) -> str:
    return json.dumps(dataclasses.asdict(event), default=str, indent=indent)


async def main(mail: str, webhook: str) -> None:
    """Raise an alert, and acknowledge it."""
    place = urlsplit(mail)
    alert_manager = AlertManager()
    alert_manager.add_notifier(EmailNotifier(place.hostname or "localhost", place.port or 25, place.path.strip("/")))
    alert_manager.add_notifier(WebhookNotifier(webhook))
    await alert_manager.notify_violation_created(ViolationCreated(5, violation_id=7, rule_name="one beyond zone A"))
    await alert_manager.notify_violation_acknowledged(ViolationAcknowledged(violation_id=7, user="ada"))
    await alert_manager.event_bus.stop(drain_timeout=2 * TIMEOUT)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
