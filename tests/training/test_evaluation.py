"""Which answers are right: in the order of the data, with every module's mode as it was."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sidt.training.evaluation import correct, top1


def test_correct_is_in_order_and_restores_the_modes():
    class Echo(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Dropout(0.9)

        def forward(self, images):
            return self.inner(nn.functional.one_hot(images.flatten(1)[:, 0].long(), 4).float())

    images = torch.tensor([0, 1, 2, 3, 0, 1, 2.0]).view(-1, 1, 1, 1)
    data = TensorDataset(images, torch.tensor([0, 1, 0, 3, 3, 1, 2]))
    model = Echo()
    model.inner.eval()
    hits = correct(model, data, batch_size=3, device="cpu")
    assert hits.dtype == bool and hits.tolist() == [True, True, False, True, False, True, True]
    assert model.training and not model.inner.training
    assert top1(model, data, batch_size=2, device="cpu") == pytest.approx(5 / 7)
