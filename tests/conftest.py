"""What every test shares: a fixed seed, repeatable property tests, and how a user's mistake is answered."""

from contextlib import contextmanager

import pytest
import torch
from backbones import BACKBONES, EVERY_DAY, Backbone
from hypothesis import settings

import sidt.detection  # noqa: F401 - mmcv's operators, for tests that import MMDetection's models first
from sidt.errors import InputError

settings.register_profile("sidt", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("sidt")
torch.set_num_threads(1)  # the models are tiny: threads would wait for each other, most of all on a busy machine


def pytest_collection_modifyitems(items):
    """What is tried on every backbone is slow but for one of each family."""
    for item in items:
        given = getattr(item, "callspec", None)
        ours = [v for v in given.params.values() if isinstance(v, Backbone) and v in BACKBONES] if given else []
        if any(str(backbone) not in EVERY_DAY for backbone in ours):
            item.add_marker(pytest.mark.slow)


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
