"""The trained network that the tests of this folder share."""

import pytest
from digits_subject import Subject, train_subject


@pytest.fixture(scope="session")
def subject() -> Subject:
    """Trained once per session; see ``train_subject``."""
    return train_subject()
