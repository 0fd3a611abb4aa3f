"""One small actor that carries messages from wherever training runs to the driver.

The driver alone writes the run's files, so nothing on a worker needs a shared file system: networks travel as bytes.
"""

from __future__ import annotations

from typing import Any

Message = tuple[str, str, dict[str, Any]]
"""Kind ("begun", "epoch", "trained", "failed"), trial, content."""


class Mailbox:
    """Keeps messages in the order of arrival until the driver takes them. Made with ``ray.remote``."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def put(self, message: Message) -> None:
        self.messages.append(message)

    def take(self) -> list[Message]:
        taken, self.messages = self.messages, []
        return taken
