"""torch.fx replaces ``Module.__call__`` for all threads while it traces."""

import threading

from torch import nn

from cactus_ray.bounds import trace as module
from cactus_ray.bounds.trace import trace


def test_a_module_is_called_only_while_no_other_thread_traces() -> None:
    """What is checked waits for the lock, and so does what is traced."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(trace(nn.Sequential(nn.Linear(2, 2)), (2,))[0].nodes)))
    with module.PATCHED:
        thread.start()
        thread.join(timeout=0.5)
        assert not found
    thread.join(timeout=60)
    assert found == [2]


def test_many_threads_trace_at_once() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
