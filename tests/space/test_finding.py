"""Which file is a model's: of the search path, of an installed package, of the model itself, or one that ships."""

import os
import sys
from importlib import metadata

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sidt.space.finding import (
    SPACES,
    _installed,
    families,
    family_of,
    own_families,
    search_path,
    use_spaces,
    wrapped_in,
)
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model

FILE = """
models: [{models}]
axes: {{hidden: mlp}}
parameters:
  fc1.weight: hidden, _
  fc1.bias: hidden
  fc2.weight: _, hidden
  fc2.bias: _
"""


class Net(nn.Module):
    """A user's own model: an MLP on a 3 x 2 x 2 image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)).relu())


NET = f"{__name__}.Net"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """``written("mine")`` is a file for Net; the search path is empty at first, and as before at the end."""
    monkeypatch.setenv(SPACES, "")

    def write(name: str, models: str = NET, text: str = FILE):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(models=models))
        return file

    return write


def test_a_file_on_the_search_path_is_found(written, refused):
    with refused(NET, "--space", SPACES):
        space_for(Net(), (3, 2, 2))
    file = written("mine.yaml")
    use_spaces(file)
    assert space_for(Net(), (3, 2, 2)).sizes == {"hidden": 5}
    assert search_path() == (file,) and os.environ[SPACES] == str(file)  # for processes that are started
    assert wrapped_in(nn.DataParallel(Net())) == "module"


def test_a_folder_a_relative_path_and_a_changed_file(written, monkeypatch, refused):
    file = written("spaces/mine.yaml")
    monkeypatch.chdir(file.parent.parent)
    use_spaces("spaces")
    monkeypatch.chdir("/")
    assert space_for(Net(), (3, 2, 2)).family == "mine"
    use_spaces("/" / file.parent)  # again: once
    assert len(search_path()) == 1
    file.write_text(file.read_text().replace("fc2.bias: _", ""))
    os.utime(file, ns=(1, 1))
    with refused("fc2.bias", "mine.yaml"):
        space_for(Net(), (3, 2, 2))


def test_what_is_wrong_with_a_search_path(written, refused, tmp_path):
    with refused("nowhere.yaml", "No such file"):
        use_spaces(tmp_path / "nowhere.yaml")
    (tmp_path / "empty").mkdir()
    with refused("empty", "no search space"):
        use_spaces(tmp_path / "empty")
    one, two = written("one.yaml"), written("two.yaml")
    with refused(NET, "one.yaml", "two.yaml", "two search spaces"):
        use_spaces(one, two)
    assert search_path() == ()


def test_a_file_for_another_model(written, refused):
    file = written("mine.yaml", "somewhere.Other")
    with refused("mine.yaml", "somewhere.Other", NET, "models"):
        family_of(Net(), file)
    with refused("wraps a model", "model.module"):
        family_of(nn.DataParallel(Net()), written("mine.yaml"))


def test_your_own_stands_in_place_of_what_ships(written):
    (vit,) = (family for family in families() if family.file.stem == "vit")
    assert not vit.text and family_of(timm.create_model("vit_tiny_patch16_224", depth=1)) is vit
    text = (
        vit.file.read_text().replace("hidden.{i}: mlp", "hidden.{i}: mlp  # mine").replace("{", "{{").replace("}", "}}")
    )
    use_spaces(written("mine.yaml", text=text))
    mine = family_of(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert mine.file.stem == "mine" and "# mine" in mine.text and mine.models == vit.models
    assert VisionTransformer.__qualname__ in vit.models[0]


def test_what_was_sliced_keeps_its_file(written):
    file = written("mine.yaml")
    space = space_for(Net(), (3, 2, 2), file=file)
    assert space.own is not None and space.own.text == file.read_text()
    small = slice_model(Net(), DimensionPlan(space, {"hidden": [0, 3]}))
    assert space_for(small, (3, 2, 2)).sizes == {"hidden": 2}
    assert small(torch.ones(1, 3, 2, 2)).shape == (1, 4)
    assert not hasattr(slice_model(*_tiny()), "sidt_family")  # of a file that ships there is nothing to keep


def _tiny():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32)
    return model, DimensionPlan(space_for(model), {"hidden.0": [1]})


@pytest.fixture
def installed(written, monkeypatch, tmp_path):
    """A package with a search space, as one that is installed."""

    def install(value: str):
        point = metadata.EntryPoint(name="theirs", value=value, group="sidt.search_spaces")
        monkeypatch.setattr("sidt.space.finding.entry_points", lambda group: [point] if group == point.group else [])
        _installed.cache_clear()

    written("their_package/theirs.yaml")
    (tmp_path / "their_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    _installed.cache_clear()
    sys.modules.pop("their_package", None)


def test_installed_packages(installed, refused):
    installed("their_package")
    assert [family.file.name for family in own_families()] == ["theirs.yaml"]
    assert space_for(Net(), (3, 2, 2)).family == "theirs"
    installed("their_other_package")
    with refused("theirs", "their_other_package", "sidt.search_spaces"):
        own_families()
