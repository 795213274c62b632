"""Python's side of the mailbox: one for each event loop, drained when its descriptor becomes readable.

Rust threads never call into Python. What they have to say (an outcome, a report, a request to call a user's hook)
lies in the mailbox until the loop reads it, a whole batch for one wake-up.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from safe_broadcaster import _core

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Mailbox", "Questions", "Reply"]

T = TypeVar("T")
logger = logging.getLogger("safe_broadcaster")

# Values must not refer to their loop, or no loop would ever be collected.
_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


class Reply(Generic[T]):
    """One answer that Rust will give: hand ``token`` to the core, then ``await reply.wait()``."""

    __slots__ = ("_future", "token")

    def __init__(self, token: int, future: asyncio.Future[T]) -> None:
        self.token = token
        self._future = future
        future.add_done_callback(_look)  # an error may come when nobody waits any more

    async def wait(self) -> T:
        """Wait for the answer; raises it if it is an exception."""
        return await self._future

    async def wait_for(self, seconds: float | None) -> bool:
        """Wait for at most so many seconds; False if there was no answer. Raises it if it is an exception.

        Whoever gives up may wait again, and others at the same time. Unlike `asyncio.wait_for`, before Python 3.12, it
        loses no cancellation that comes together with the answer.
        """
        await asyncio.wait({self._future}, timeout=seconds)
        if self._future.done():
            self._future.result()
        return self._future.done()

    def is_answered(self) -> bool:
        """Whether the answer is there."""
        return self._future.done()


def _look(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


class Questions:
    """What is asked of the core again and again: a question stays there until it is answered, so each is asked once."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[Mailbox, Reply[None]]] = {}

    def is_open(self, what: str) -> bool:
        """Whether it was asked and is not answered."""
        return what in self._asked and not self._asked[what][1].is_answered()

    async def answered(self, what: str, ask: Callable[[_core.Mailbox, int], None], seconds: float | None) -> bool:
        """Ask, unless that is open already, and wait for the answer as `Reply.wait_for` does."""
        mailbox = Mailbox.current()
        if not self.is_open(what) or self._asked[what][0] is not mailbox:
            reply: Reply[None] = mailbox.reply()
            ask(mailbox.core, reply.token)
            self._asked[what] = mailbox, reply
        return await self._asked[what][1].wait_for(seconds)


class Mailbox:
    """The letters for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.core = _core.Mailbox()
        self._handlers: dict[int, Callable[[Any], None]] = {}
        self._tokens = itertools.count(1)
        loop.add_reader(self.core.fileno(), self._drain)

    @classmethod
    def current(cls) -> Mailbox:
        """Return the mailbox of the running loop, made at first use."""
        loop = asyncio.get_running_loop()
        found = _mailboxes.get(loop)
        if found is None:
            found = _mailboxes[loop] = cls(loop)
        return found

    def reply(self) -> Reply[Any]:
        """Expect one answer."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        token = next(self._tokens)

        def settle(value: object) -> None:
            del self._handlers[token]
            if future.done():  # cancelled meanwhile: the work went on all the same
                return
            if isinstance(value, BaseException):
                future.set_exception(value)
            else:
                future.set_result(value)

        self._handlers[token] = settle
        return Reply(token, future)

    def subscribe(self, handler: Callable[[Any], None]) -> int:
        """Register a handler for any number of letters; returns its token."""
        token = next(self._tokens)
        self._handlers[token] = handler
        return token

    def unsubscribe(self, token: int) -> None:
        """Forget a handler; later letters for it are dropped."""
        self._handlers.pop(token, None)

    def _drain(self) -> None:
        for token, value in self.core.drain():
            handler = self._handlers.get(token)
            if handler is None:
                continue
            try:
                handler(value)
            except Exception:
                logger.exception("a mailbox handler failed")
