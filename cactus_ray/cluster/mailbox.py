"""One small actor that carries messages from wherever training runs to the driver, and answers back.

The driver alone writes the run's files, so nothing on a worker needs a shared file system: networks travel as bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

Message = tuple[str, str, dict[str, Any]]
"""Kind ("begun", "epoch", "rung", "trained", "stopped", "failed", "saved"), trial, content."""
ENDS = ("trained", "stopped", "failed")


class Mailbox:
    """Keeps messages in the order of arrival until the driver takes them. Made with ``ray.remote``.

    Asynchronous, so that a trial that waits for its answer keeps nobody else waiting.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.saved: dict[str, dict[str, Any]] = {}
        self.states: dict[str, bytes] = {}
        self.open: dict[tuple[str, int], asyncio.Future[bool]] = {}

    async def put(self, message: Message) -> None:
        self.messages.append(message)
        if message[0] in ENDS:
            self.states.pop(message[1], None)

    async def save(self, trial: str, epoch: int, data: bytes) -> None:
        """The state of a trial after an epoch that it has reported. One that waits is replaced by a newer one."""
        self.saved[trial] = {"epoch": epoch, "data": data}

    async def take(self) -> list[Message]:
        """What has come since the last call; the states last, so that their epochs are known before them."""
        taken, self.messages = self.messages, []
        states, self.saved = self.saved, {}
        return [*taken, *(("saved", trial, content) for trial, content in states.items())]

    async def hand(self, trial: str, data: bytes) -> None:
        """The driver's word from which state a trial goes on; kept until the trial ends."""
        self.states[trial] = data

    async def state(self, trial: str) -> bytes | None:
        """What ``hand`` brought."""
        return self.states.get(trial)

    async def ask(self, trial: str, content: dict[str, Any]) -> bool:
        """Report an epoch at a rung, and wait until the driver says whether the trial goes on."""
        answer = asyncio.get_running_loop().create_future()
        self.open[trial, content["epoch"]] = answer
        self.messages.append(("rung", trial, content))
        return bool(await answer)

    async def answer(self, trial: str, epoch: int, go_on: bool) -> None:
        """The driver's word on a trial that asked; a trial that has died meanwhile misses it."""
        answer = self.open.pop((trial, epoch), None)
        if answer is not None and not answer.done():
            answer.set_result(go_on)
