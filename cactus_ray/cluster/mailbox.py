"""One small actor that carries messages from wherever training runs to the driver, and answers back.

The driver alone writes the run's files, so nothing on a worker needs a shared file system: networks travel as bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

Message = tuple[str, str, dict[str, Any]]
"""Kind ("holds", "begun", "epoch", "rung", "trained", "stopped", "failed"), trial, content."""


class Mailbox:
    """Keeps messages in the order of arrival until the driver takes them. Made with ``ray.remote``.

    Asynchronous, so that a trial that waits for its answer keeps nobody else waiting.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.open: dict[tuple[str, int], asyncio.Future[bool]] = {}

    async def put(self, message: Message) -> None:
        self.messages.append(message)

    async def take(self) -> list[Message]:
        taken, self.messages = self.messages, []
        return taken

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
