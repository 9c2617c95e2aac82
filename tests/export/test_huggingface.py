"""Hugging Face's models: by name from a folder, and in checkpoints that rebuild them from a class and its config."""

import json
import sys

import pytest
import torch
from backbones import SMALL_DETR, SMALL_HF_RESNET, TRANSFORMERS_BACKBONES, Backbone, dense, random_plan, sublayers
from torch import nn

import sidt
from sidt.export.models import create_model
from sidt.runs.sources import space_of
from sidt.space.outputs import classes_of, heads_of, tensors_of
from sidt.space.trace import input_size_of
from sidt.surgery.slicing import slice_model

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
CLASSIFIER = next(b for b in TRANSFORMERS_BACKBONES if b.name == "ViTForImageClassification")
TEACHER = next(b for b in TRANSFORMERS_BACKBONES if b.name.endswith("WithTeacher"))
TOKENS = next(b for b in TRANSFORMERS_BACKBONES if b.name == "ViTModel")


@torch.no_grad()
def same(model, other, images):
    pairs = zip(tensors_of(model(images)), tensors_of(other(images)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def folder(tmp_path):
    """What save_pretrained writes, with how images are prepared."""
    dense(CLASSIFIER)[0].save_pretrained(tmp_path / "vit")
    says = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "resample": 3}
    says |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(says))
    return tmp_path / "vit"


@pytest.mark.parametrize("backbone", TRANSFORMERS_BACKBONES, ids=str)
@pytest.mark.parametrize("empty", ["", "apart", "together"])
def test_round_trip(backbone, empty, tmp_path):
    model, space = dense(backbone)
    small = slice_model(model, random_plan(space, 1, empty=sublayers(space, empty) if empty else ()))
    sidt.save(small, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "plan.json"]
    loaded = sidt.load(tmp_path)
    assert same(loaded, small, backbone.images())
    assert type(loaded) is type(model) and loaded.sidt_plan.sizes == small.sidt_plan.sizes


@pytest.mark.parametrize("backbone", TRANSFORMERS_BACKBONES, ids=str)
def test_what_save_pretrained_wrote_is_read(backbone, tmp_path):
    model, _ = dense(backbone)
    model.save_pretrained(tmp_path)
    again = create_model(f"hf:{tmp_path}", {}, pretrained=True)
    assert type(again) is type(model) and not again.training
    assert same(again, model, backbone.images())
    assert not same(create_model(f"hf:{tmp_path}", {}), model, backbone.images())


def test_a_model_without_its_pooling_comes_back(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**TOKENS.kwargs), add_pooling_layer=False).eval()
    sidt.save(model, tmp_path)
    assert same(sidt.load(tmp_path), model, TOKENS.images())
    model.save_pretrained(tmp_path / "theirs")
    assert create_model(f"hf:{tmp_path / 'theirs'}", {}, pretrained=True).pooler is None


def test_a_detector_that_does_not_say_its_image_size(tmp_path, refused):
    """As DETR's published configs are: a checkpoint keeps the size that its space is of, or that is given."""
    unsaid = {key: value for key, value in SMALL_HF_RESNET.items() if key != "image_size"}
    kwargs = SMALL_DETR | {"backbone_config": unsaid}
    model = Backbone("DetrForObjectDetection", kwargs, source="transformers").build()
    with refused("does not say its image size", "input_size"):
        sidt.save(model, tmp_path / "none")
    small = slice_model(model, random_plan(sidt.space_for(model, (3, 64, 64)), 0))
    images = torch.randn(1, 3, 64, 64)
    for saved, size in ((small, None), (model, (3, 96, 64))):
        sidt.save(saved, tmp_path / "kept", input_size=size)
        again = sidt.load(tmp_path / "kept")
        assert same(again, saved.eval(), images)
        assert input_size_of(again) == (size or (3, 64, 64))
        sidt.save(again, tmp_path / "again")  # which says it now
        assert input_size_of(sidt.load(tmp_path / "again")) == (size or (3, 64, 64))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps(config | {"input_size": [3, "64"]}))
    with refused("config.json", "input_size", "[3, height, width]"):
        sidt.load(tmp_path / "again")
    model.save_pretrained(tmp_path / "theirs")
    assert space_of(f"hf:{tmp_path / 'theirs'}", (3, 64, 64)).trace.input_size == (3, 64, 64)
    assert space_of(str(tmp_path / "kept")).trace.input_size == (3, 96, 64)


def test_classes_sizes_and_preparation(folder):
    model = create_model(f"hf:{folder}", {"num_classes": 3}, pretrained=True)
    assert classes_of(model) == model.config.num_labels == len(model.classifier.weight) == 3
    assert torch.equal(model.vit.layernorm.weight, dense(CLASSIFIER)[0].vit.layernorm.weight)
    assert model.pretrained_cfg == {
        **{"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "interpolation": "bicubic"},
        **{"crop_pct": 0.8, "crop_mode": "center"},
    }
    assert input_size_of(model) == (3, 32, 32)
    assert input_size_of(create_model(f"hf:{folder}", {}, input_size=(1, 48, 32))) == (1, 48, 32)
    assert classes_of(dense(TOKENS)[0]) == 0 and classes_of(nn.Linear(1, 1)) is None


def test_what_a_model_gives():
    out = dense(TEACHER)[0](TEACHER.images())
    assert torch.stack(heads_of(out)).mean(0).allclose(out.logits) and len(heads_of(out)) == 2
    tokens = dense(TOKENS)[0](TOKENS.images())
    assert heads_of(tokens) == [tokens.pooler_output] and len(list(tensors_of(tokens))) == 2


@pytest.mark.parametrize("backbone", [CLASSIFIER, TEACHER, TOKENS], ids=str)
def test_shrunk_trained_and_taught(backbone):
    model, _ = dense(backbone)
    images = [(backbone.images(4), torch.arange(4))]
    small = sidt.shrink(model, images, sidt.Budget(params=0.6)).model
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())
    data = [(image, label) for image, label in zip(*images[0], strict=True)]
    if backbone is not TOKENS:
        sidt.finetune(small, data, epochs=1, batch_size=2, loss=sidt.distillation_loss(model, small))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": None}, "no name"),
        ({"architectures": ["MyViT"], "auto_map": {"AutoModel": "my.MyViT"}}, "never run"),
        ({"architectures": ["ViTConfig"]}, "has no model ViTConfig"),
        ({"hidden_size": 36}, "another shape"),
    ],
)
def test_a_folder_of_something_else(folder, change, says, refused):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with refused(says):
        create_model(f"hf:{folder}", {}, pretrained=True)


def test_pickles_are_refused(folder, refused):
    (folder / "model.safetensors").unlink()
    torch.save(dense(CLASSIFIER)[0].state_dict(), folder / "pytorch_model.bin")
    with refused("cannot build"):
        create_model(f"hf:{folder}", {}, pretrained=True)


def test_names_of_nothing(tmp_path, refused):
    with refused("no folder nowhere"):
        create_model("hf:nowhere", {})
    with refused("no config.json"):
        create_model(f"hf:{tmp_path}", {})
    for name in ("transformers.models.vit.modeling_vit.nn", "transformers.models.vit.modeling_vit.MyViT"):
        with refused("has no model"):
            create_model(name, {})


def test_a_checkpoint_names_no_class_of_others(tmp_path, refused):
    sidt.save(dense(CLASSIFIER)[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in (
        "torch.nn.Linear",
        "transformers.utils.generic.ModelOutput",
        "transformers.models.vit.modeling_vit.nn",
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model": name}))
        with refused("has no model"):
            sidt.load(tmp_path)


def test_without_the_extra(folder, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("sidt[transformers]"):
        create_model(f"hf:{folder}", {})


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_of_images_and_text_the_part_for_images_is_read(name, tmp_path):
    vision = next(b.kwargs for b in TRANSFORMERS_BACKBONES if b.name == f"{name}VisionModel")
    text = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
    text |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    library = {kind: getattr(transformers, f"{name}{kind}") for kind in ("Config", "Model")}
    both = library["Model"](library["Config"](text_config=text, vision_config=vision)).eval()
    both.save_pretrained(tmp_path)
    model = create_model(f"hf:{tmp_path}", {}, pretrained=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert type(model).__name__ == f"{name}VisionModel" and same(model, both.vision_model, images)
    sidt.space_for(model)
