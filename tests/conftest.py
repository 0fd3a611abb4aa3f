"""What all tests share: one torch thread, explicit generators, where the real data lie."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    """What a test draws from torch's default generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data sets (``CACTUS_TEST_DATA``, default ``../shared/data``)."""
    path = Path(os.environ.get("CACTUS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set CACTUS_TEST_DATA")
    return path
