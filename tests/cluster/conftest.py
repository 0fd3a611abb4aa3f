"""One Ray for the tests of this folder that need none of their own: a start costs more than most of them."""

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cactus_ray.errors import RunFailedError

CPUS = 4
STARTS = 4
"""How often Ray is started until it is up: it gives itself half a minute, which a busy machine may exceed."""


_shared = contextlib.ExitStack()
"""Holds the Ray that tests share, while there is one."""


@pytest.fixture(scope="session", autouse=True)
def _end_of_the_shared_ray() -> Iterator[None]:
    yield
    _shared.close()


@pytest.fixture(autouse=True)
def _no_other_ray(request: pytest.FixtureRequest) -> None:
    """A test that starts a Ray itself finds none: the shared one ends before it."""
    if request.node.get_closest_marker("ray") and "shared_ray" not in request.fixturenames:
        _shared.close()


@pytest.fixture
def shared_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of four CPUs, which the studies of this test run on; nothing of them may be left on it at the end.

    Its processes can import this folder, and know the driver's (see ``deadly_network``).
    """
    import ray
    from test_ray_train import free_cpus

    from cactus_ray.cluster import connect, driver

    if not ray.is_initialized():
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setenv("PYTHONPATH", path)
            patch.setenv("CACTUS_TEST_DRIVER", str(os.getpid()))
            warnings.simplefilter("ignore")  # Ray drops the processes of a start that failed, and Python says so
            for left in reversed(range(STARTS)):
                with contextlib.suppress(*[RunFailedError] * bool(left)):
                    _shared.enter_context(connect.connected(None, cpus=CPUS))
                    break
                ray.shutdown()
                gc.collect()

    def joined(*_: Any, **__: Any) -> Any:
        return contextlib.nullcontext(dict(ray.cluster_resources()))

    monkeypatch.setattr(driver, "connected", joined)
    yield
    gc.collect()  # actors end with their last handle
    assert free_cpus(CPUS) == CPUS
