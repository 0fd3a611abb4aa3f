"""One small actor that carries messages from wherever training runs to the driver, and answers back.

The driver alone writes the run's files, so nothing on a worker needs a shared file system: networks travel as bytes.
"""

from __future__ import annotations

import asyncio
from typing import Any

Message = tuple[str, str, dict[str, Any]]
"""Kind ("holds", "begun", "epoch", "rung", "saved", or one of ``ENDS``), sender, content."""
ENDS = ("trained", "stopped", "waits", "failed", "oom")


def sender_of(trial: str, attempt: int) -> str:
    """Who sends: a trial in one of its attempts, because workers of an earlier one may still be there."""
    return f"{trial}#{attempt}"


def trial_of(sender: str) -> str:
    """The trial of a sender."""
    return sender.rpartition("#")[0]


LOST = (
    "the process through which trials report to the driver has died (killed, or out of memory); what is finished is "
    "kept: the same command goes on"
)
"""What a search says that lost its mailbox."""


def open_mailbox(node: str) -> Any:
    """A mailbox actor on the node with this id: on the driver's, the end of no other node takes it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=there)(Mailbox).remote()


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

    async def save(self, sender: str, epoch: int, data: bytes) -> None:
        """The state of a trial after an epoch that it has reported. One that waits is replaced by a newer one."""
        self.saved[sender] = {"epoch": epoch, "data": data}

    async def take(self) -> list[Message]:
        """What has come since the last call; the states last, so that their epochs are known before them."""
        taken, self.messages = self.messages, []
        states, self.saved = self.saved, {}
        return [*taken, *(("saved", sender, content) for sender, content in states.items())]

    async def hand(self, sender: str, data: bytes) -> None:
        """The driver's word from which state a trial goes on; kept until the trial ends, or its next attempt begins."""
        others = {s: d for s, d in self.states.items() if trial_of(s) != trial_of(sender)}
        self.states = {**others, sender: data}

    async def state(self, sender: str) -> bytes | None:
        """What ``hand`` brought."""
        return self.states.get(sender)

    async def ask(self, sender: str, content: dict[str, Any]) -> bool:
        """Report an epoch at a rung, and wait until the driver says whether the trial goes on."""
        answer = asyncio.get_running_loop().create_future()
        self.open[sender, content["epoch"]] = answer
        self.messages.append(("rung", sender, content))
        return bool(await answer)

    async def answer(self, sender: str, epoch: int, go_on: bool) -> None:
        """The driver's word on a trial that asked; a trial that has died meanwhile misses it."""
        answer = self.open.pop((sender, epoch), None)
        if answer is not None and not answer.done():
            answer.set_result(go_on)
