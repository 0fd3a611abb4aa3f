"""A W&B for tests of the process around it: quick, without a server, and as ill as ``STAND_IN`` says.

It writes one JSON line per call to the file named by ``STAND_IN_LOG``.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ILLNESS = os.environ.get("STAND_IN", "")


def note(call: str, **what: Any) -> None:
    with Path(os.environ["STAND_IN_LOG"]).open("a") as log:
        log.write(json.dumps({"call": call, "pid": os.getpid(), "key": os.environ.get("WANDB_API_KEY"), **what}) + "\n")


class Settings:
    def __init__(self, **_: Any) -> None:
        pass


class Run:
    def __init__(self, name: str, folder: Path) -> None:
        self.id, self.folder = name, folder
        self.config = self.summary = SimpleNamespace(update=lambda *_, **__: None)
        self.url = f"https://wandb.example/somebody/tests/runs/{name}"

    def log(self, row: Any) -> None:
        if ILLNESS == "dies":
            os._exit(7)
        note("log", run=self.id)

    def finish(self, **_: Any) -> None:
        note("finish", run=self.id)


def init(*, id: str, mode: str, dir: str, **_: Any) -> Run:  # noqa: A002 - W&B's names
    note("init", run=id, mode=mode)
    if ILLNESS == "hangs":
        time.sleep(3600)
    if ILLNESS == "refuses" and mode == "online":
        raise RuntimeError("permission denied\nand much more")
    print("W&B says hello")  # it must not reach the driver as an answer
    folder = Path(dir, "wandb", f"{'offline-' if mode == 'offline' else ''}run-{id}")
    folder.mkdir(parents=True)
    (folder / f"run-{id}.wandb").touch()
    return Run(id, folder)


def teardown() -> None:
    note("teardown")


def Table(**_: Any) -> None:  # noqa: N802 - W&B's name
    pass


def Plotly(_: Any) -> None:  # noqa: N802 - W&B's name
    pass
