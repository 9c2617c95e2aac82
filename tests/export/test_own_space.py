"""A search space that does not come with SiDT goes with the model: into folders, out of them, to the hub and back."""

import json
import re

import pytest
import timm
import torch
from backbones import random_plan, shake
from hub import serving, use

import sidt
from sidt.space.finding import SPACES, families

ARGS = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of timm's ViT with another name for its width: nothing made by it goes with the file that ships."""
    monkeypatch.setenv(SPACES, "")
    (vit,) = (family.file for family in families() if family.file.stem == "vit")
    file = tmp_path / "mine.yaml"
    file.write_text(re.sub(r"\bembed\b", "stream", vit.read_text()))
    return file


@pytest.fixture
def small(mine):
    model = shake(timm.create_model("vit_tiny_patch16_224", **ARGS)).eval()
    space = sidt.space_for(model, file=mine)
    assert "stream" in space.dimensions and "embed" not in space.dimensions
    return sidt.slice_model(model, random_plan(space, 0))


def test_a_sliced_model_takes_its_file_along(small, mine, tmp_path):
    folder = tmp_path / "small"
    sidt.save(small, folder)
    text = mine.read_text()
    mine.unlink()  # the folder is all that is needed
    loaded = sidt.load(folder)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), small(images))
    assert (folder / "space.yaml").read_text() == text
    assert json.loads((folder / "config.json").read_text())["space"] == "space.yaml"
    assert sidt.space_for(loaded).sizes == small.sidt_plan.sizes
    again = sidt.slice_model(loaded, random_plan(sidt.space_for(loaded), 1))
    sidt.save(again, folder)
    assert torch.equal(sidt.load(folder)(images), again(images))
    sidt.save(timm.create_model("vit_tiny_patch16_224", **ARGS), folder)  # of a file that ships
    assert not (folder / "space.yaml").exists() and "space" not in json.loads((folder / "config.json").read_text())


def test_a_dense_model_on_the_search_path(mine, tmp_path):
    sidt.use_spaces(mine)
    model = timm.create_model("vit_tiny_patch16_224", **ARGS).eval()
    sidt.save(model, tmp_path / "dense")
    assert "stream" in sidt.space_for(sidt.load(tmp_path / "dense")).dimensions


def test_a_student_teaches_its_file_to_the_teacher(small):
    teacher = timm.create_model("vit_tiny_patch16_224", **ARGS)
    loss = sidt.distillation_loss(teacher, small, logits=0, labels=0)  # blocks alone: their width is the file's
    assert float(loss(small, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).detach()) > 0


def test_a_folder_without_its_file(small, tmp_path, refused):
    folder = tmp_path / "small"
    sidt.save(small, folder)
    (folder / "space.yaml").write_text((folder / "space.yaml").read_text() + "\nforwards: nowhere.at_all\n")
    with refused("nowhere.at_all", "forwards"):
        sidt.load(folder)
    (folder / "space.yaml").unlink()
    with refused("space.yaml", "No such file"):
        sidt.load(folder)


def test_to_the_hub_and_back(small, tmp_path, monkeypatch):
    from sidt.runs.card import push

    sidt.save(small, tmp_path / "small")
    with serving() as hub:
        use(monkeypatch, hub.url, tmp_path)
        push(tmp_path / "small", "someone/small", private=True)
        assert set(hub.files("someone/small")) >= {"config.json", "plan.json", "model.safetensors", "space.yaml"}
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(sidt.load("hf-hub:someone/small")(images), small(images))
