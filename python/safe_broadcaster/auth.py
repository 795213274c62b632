"""Who may connect to a hub, and do what there: the values of its setting ``auth``.

::

    hub = EventBroadcaster(auth=JwtAuth(secret=os.environ["JWT_SECRET"]))
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safe_broadcaster import _core

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from safe_broadcaster.mailbox import Mailbox

    AuthCallback = Callable[[str], "Awaitable[Grant | None] | Grant | None"]

__all__ = ["AuthDesk", "Grant", "JwtAuth"]

logger = logging.getLogger("safe_broadcaster")


@dataclass(frozen=True)
class JwtAuth:
    """Tokens are JSON Web Tokens, signed with ``secret`` (HS256) or by the owner of ``public_key`` (RS256).

    Claims: ``exp`` is required; ``sub`` is who it is; ``subscribe`` and ``publish`` are lists of patterns, and what is
    not named is not granted. ``alg`` must be the one that belongs to the key.
    """

    secret: str | None = field(default=None, repr=False)
    """Shared with whoever issues tokens; at least 32 bytes, since a shorter one can be guessed from a token."""
    public_key: str | None = None
    """The issuer's RSA public key as PEM text. Either this or ``secret``."""
    issuer: str | None = None
    """What ``iss`` must say. None: it is not looked at."""
    audience: str | None = None
    """What ``aud`` must name. None: tokens that name an audience are refused, because they are meant for others."""
    leeway: float = 5.0
    """Seconds by which the clocks of hub and issuer may differ."""


@dataclass(frozen=True)
class Grant:
    """What a function given as ``auth`` returns for a good token. ``("*",)`` is everything, ``()`` nothing."""

    subject: str | None = None
    """Who it is; told to the client and nobody else."""
    subscribe: Sequence[str] = ()
    """Patterns; what a client subscribes to must lie within one of them."""
    publish: Sequence[str] = ()
    """Patterns; both the type and the topic of an event must match one, as far as it has them."""
    expires: float | None = None
    """Unix time from which on it counts no more; None for ever."""


class AuthDesk:
    """Asks the user's function, on the loop that started the hub."""

    def __init__(self, ask: AuthCallback) -> None:
        self.core = _core.AuthDesk()
        self._ask = ask
        self._mailbox: weakref.ref[Mailbox] | None = None
        self._token = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, mailbox: Mailbox) -> None:
        """Serve questions on the running loop from now on."""
        self.stop()
        self._mailbox = weakref.ref(mailbox)
        self._token = mailbox.subscribe(self._question)
        self.core.serve(mailbox.core, self._token)

    def stop(self) -> None:
        """Serve nothing any more."""
        mailbox = self._mailbox and self._mailbox()
        if mailbox is not None:
            mailbox.unsubscribe(self._token)
        self._mailbox = None

    def _question(self, question: tuple[int, str]) -> None:
        number, token = question
        task = asyncio.get_running_loop().create_task(self._answer(number, token))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, token: str) -> None:
        answered = False
        try:
            outcome: Any = self._ask(token)
            grant = await outcome if inspect.isawaitable(outcome) else outcome
            if grant is not None and not isinstance(grant, Grant):
                raise TypeError(f"auth returns a Grant or None, not {type(grant).__name__}")  # noqa: TRY301 - logged below
            self.core.answer(number, grant)
            answered = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the token is refused
            # The error itself may quote the token.
            logger.error(  # noqa: TRY400
                "the auth function failed with %s; the token is refused", type(error).__name__
            )
        finally:
            if not answered:
                self.core.fail(number)
