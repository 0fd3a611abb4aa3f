"""What the tests of this folder share: a trained network, and searches that end by their sub-problems alone."""

import math
from collections.abc import Iterator

import pytest
from digits_subject import Subject, train_subject

from cactus_ray.verification import stages


@pytest.fixture(scope="session", autouse=True)
def _no_limit_of_time() -> Iterator[None]:
    """Branch and bound ends by its nodes wherever a test states no seconds: verdicts do not depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "DEFAULT_SECONDS", math.inf)
        yield


@pytest.fixture(scope="session")
def subject() -> Subject:
    """Trained once per session; see ``train_subject``."""
    return train_subject()
