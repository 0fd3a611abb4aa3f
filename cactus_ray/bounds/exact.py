"""float32 that is float32: the switches with which torch would shorten its products, off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """float32 is float32 inside: no TF32, no bfloat16 products, no autocast. The settings of before are restored.

    They are the whole process's: threads that overlap inside would undo each other's.
    """
    restore = _forbid_short_products()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        restore()


def _forbid_short_products() -> Callable[[], None]:
    """Switch them off; returns what undoes it. torch has two sets of switches and refuses to mix them."""
    backends: Any = torch.backends
    # from torch 2.9 on; what the CPU does has no older switch of its own
    modern = [getattr(backends.mkldnn, name) for name in ("conv", "matmul") if hasattr(backends.mkldnn, name)]
    try:
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:  # the process uses the newer switches
        legacy = None
        modern += [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    else:
        legacy = products, convolutions
    before = [switch.fp32_precision for switch in modern]
    if legacy is not None:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
    for switch in modern:
        switch.fp32_precision = "ieee"

    def restore() -> None:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy[0])
            backends.cudnn.allow_tf32 = legacy[1]
        for switch, value in zip(modern, before, strict=True):  # last: the older switch moves one of these, too
            switch.fp32_precision = value

    return restore
