"""What every test shares: a fixed seed, repeatable property tests, and how a user's mistake is answered."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

import sidt.detection  # noqa: F401 - mmcv's operators, for tests that import MMDetection's models first
from sidt.errors import InputError

settings.register_profile("sidt", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("sidt")
torch.set_num_threads(1)  # the models are tiny: threads would wait for each other, most of all on a busy machine


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def refused():
    """``with refused("name", "value"):`` expects an InputError of one line that holds those words."""

    @contextmanager
    def expect(*words):
        with pytest.raises(InputError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert all(str(word) in message for word in words), message

    return expect
