"""``sidt shrink``: from a model, a folder and a budget to a run folder; with labels or none, a head or none."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import sidt

KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
CLASSES = ("ape", "bee", "cat", "dog")


def picture(label: int, seed: int) -> Image.Image:
    """A noisy picture whose colour tells its class."""
    noise = np.random.default_rng(seed).integers(0, 120, (16, 16, 3))
    noise[..., label % 3] += 100 if label < 3 else 0
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(20):
            picture(label, 100 * label + i).save(root / name / f"{i}.png")
    return root


def trained(num_classes: int = 4) -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", **KWARGS, num_classes=num_classes).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(trained().state_dict(), path)
    return path


@pytest.fixture
def shrink(sidt_command, tmp_path):
    def command(*arguments, code=0):
        given = ["--device", "cpu", *(f"--model-kwargs={key}={value}" for key, value in KWARGS.items())]
        seen, out, err = sidt_command("shrink", *arguments, *given, "--out", tmp_path / "run")
        assert seen == code, err
        return out, tmp_path / "run"

    return command


def test_a_run_folder_comes_out_that_other_steps_go_on_from(shrink, sidt_command, images, weights):
    name = "vit_tiny_patch16_224"
    out, run = shrink(name, "--images", images, "--budget.params", "0.5", "--checkpoint", weights)
    assert "16 x 16, bicubic, crop 0.9 (center), mean 0.5, 0.5, 0.5" in out and "top-1" in out
    rows = json.loads((run / "evaluation.json").read_text())
    assert list(rows) == ["dense", "sliced"] and rows["sliced"]["images"] == 16
    assert 0.48 < rows["sliced"]["params"] / rows["dense"]["params"] <= 0.5
    assert {"report.md", "report.html"} <= {p.name for p in run.iterdir()}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["image_size"] == [16, 16] and config["data"]["crop_pct"] == 0.9
    small = sidt.load(run / "sliced")
    assert small.num_classes == 4 and small.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    code, out, err = sidt_command("finetune", run, "--set", "finetune.epochs=1", "--device", "cpu")
    assert code == 0 and "fine-tuned" in out, err
    code, out, _ = sidt_command("evaluate", run, "--device", "cpu")
    assert code == 0 and "fine-tuned" in out


def test_the_answers_are_timms_own(shrink, images, weights):
    """Top-1 before is that of timm's own transform on the same weights and images."""
    from timm.data import create_transform, resolve_model_data_config

    model = trained()
    _, run = shrink("vit_tiny_patch16_224", "--images", images, "--budget.params", "0.5", "--checkpoint", weights)
    transform = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 16, 16)})
    found = json.loads((run / "answers.json").read_text())
    from sidt.runs.config import read_config
    from sidt.runs.images import data_of

    test = data_of(read_config(run / "config.yaml").data).test
    files = [test.pixels.source.files[i].path for i in test.indices]
    with torch.no_grad():
        wanted = [int(model(transform(Image.open(f).convert("RGB"))[None]).argmax()) for f in files]
    assert found["answers"]["dense"] == wanted


def test_folders_that_are_not_the_classes_are_no_labels(shrink, images, tmp_path):
    path = tmp_path / "seven.safetensors"
    save_file(trained(7).state_dict(), path)
    out, run = shrink("vit_tiny_patch16_224", "--images", images, "--budget.params", "0.6", "--checkpoint", path)
    assert "4 class folders and the model 7 classes" in out and "same answer as dense" in out
    rows = json.loads((run / "evaluation.json").read_text())
    assert rows["dense"]["agreement"] == 1 and 0 <= rows["sliced"]["agreement"] <= 1
    assert "Same answer as dense on the test split" in (run / "report.md").read_text()


def test_a_model_without_a_head_on_images_without_labels(sidt_command, shrink, tmp_path):
    path = tmp_path / "features.safetensors"
    save_file(trained(0).state_dict(), path)
    for i in range(60):
        picture(i % 4, i).save(tmp_path / f"{i}.png")
    arguments = ["--images", tmp_path, "--budget.params", "0.6", "--checkpoint", path, "--classes", "0"]
    out, run = shrink("vit_tiny_patch16_224", *arguments)
    rows = json.loads((run / "evaluation.json").read_text())
    assert rows["dense"]["neighbours"] == 1 and rows["dense"]["relative_error"] == 0
    assert 0 < rows["sliced"]["relative_error"] < 1
    assert "same neighbour as dense" in out and "relative error" in out
    with torch.no_grad():
        assert sidt.load(run / "sliced")(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
    code, out, err = sidt_command("finetune", run, "--set", "finetune.epochs=1", "--device", "cpu")
    assert code == 0, err
    tiles = {"patterns": [{"tiles": {"rows": 4, "columns": 4}, "keep": 0.8}]}
    asked = {"structures": [{"layers": "blocks.*.mlp.*.weight", "structure": tiles}], "align": True}
    asked |= {"reach": {"by": "surgeon"}, "finetune": {"epochs": 1, "batch_size": 16, "smoothing": 0.0}}
    for weight, says in ((1.0, "same neighbour as dense"), (0.0, "teacher.features")):
        config = tmp_path / f"tiles{weight}.yaml"
        config.write_text(yaml.safe_dump(asked | {"teacher": {"features": weight}, "purify": {}}))
        code, out, err = sidt_command("compress", run, "--config", config, "--dense")
        assert code == (0 if weight else 2) and says in (out if weight else err), err


def test_some_of_the_classes(shrink, images, weights):
    arguments = ["--images", images, "--budget.params", "0.6", "--checkpoint", weights, "--classes", "dog,bee"]
    _, run = shrink("vit_tiny_patch16_224", *arguments)
    dense, whole = sidt.load(run / "dense"), trained()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(dense(image), whole(image)[:, [1, 3]], atol=1e-6)
    assert sidt.load(run / "sliced").num_classes == 2
    assert json.loads((run / "answers.json").read_text())["classes"] == ["bee", "dog"]
    assert json.loads((run / "evaluation.json").read_text())["dense"]["images"] == 8


@pytest.mark.slow
def test_from_a_checkpoint_folder_and_from_a_run(sidt_command, images, tmp_path):
    sidt.save(trained(), tmp_path / "mine")
    arguments = ["--images", images, "--budget.params", "0.6", "--device", "cpu"]
    code, _, err = sidt_command("shrink", tmp_path / "mine", *arguments, "--out", tmp_path / "one")
    assert code == 0, err
    code, _, err = sidt_command("shrink", tmp_path / "one", *arguments, "--out", tmp_path / "two")
    assert code == 0, err
    plans = [json.loads((tmp_path / name / "search" / "plan.json").read_text()) for name in ("one", "two")]
    assert plans[0] == plans[1]
    code, _, err = sidt_command("shrink", tmp_path / "one" / "sliced", *arguments, "--out", tmp_path / "three")
    assert code == 0, err
    first, third = (sidt.load(tmp_path / name / "sliced") for name in ("one", "three"))
    count = [sum(p.numel() for p in m.parameters()) for m in (first, third)]
    assert 0.55 * count[0] < count[1] <= 0.6 * count[0]


def test_mistakes(mistake, images, weights, tmp_path):
    name = "vit_tiny_patch16_224"
    kwargs = [f"--model-kwargs={key}={value}" for key, value in KWARGS.items()]
    given = [*kwargs, "--checkpoint", weights, "--device", "cpu", "--out", tmp_path / "run"]
    mistake("shrink", name, "--images", images, *given, says=["needs a budget"])
    budget = ["--budget.params", "0.6"]
    mistake("shrink", name, "--images", tmp_path / "nowhere", *budget, *given, says=["nowhere does not exist"])
    mistake("shrink", name, *budget, *given, says=["--images"])
    mistake("shrink", name, "--images", images, *budget, *given, "--classes", "dog,eel", says=["'eel'", "ape, bee"])
    mistake("shrink", tmp_path, "--images", images, *budget, "--device", "cpu", says=["no checkpoint"])
    mistake("shrink", name, "--images", images, *budget, *given, "--model-kwargs", "depth", says=["key=value"])
    mistake("shrink", name, "--images", images, *budget, *given, "--steps", "1000", says=["steps", "1000"])
    mistake("shrink", name, "--images", images, *budget, *given, "--set", "data.image_size=20", says=["20"])
    assert not (tmp_path / "run" / "sliced").exists()


def test_broken_images_are_all_named_and_left_out_if_asked(mistake, shrink, weights, tmp_path):
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            picture(label, 100 * label + i).save(tmp_path / "images" / name / f"{i}.png")
    bad = [tmp_path / "images" / name / "3.png" for name in CLASSES[:3]]
    for path in bad:
        path.write_bytes(path.read_bytes()[:50])
    arguments = ["--images", tmp_path / "images", "--budget.params", "0.6", "--checkpoint", weights]
    kwargs = [f"--model-kwargs={key}={value}" for key, value in KWARGS.items()]
    given = [*arguments, *kwargs, "--device", "cpu", "--out", tmp_path / "one"]
    mistake("shrink", "vit_tiny_patch16_224", *given, says=["3 images", *map(str, bad), "--skip-broken"])
    _, run = shrink("vit_tiny_patch16_224", *arguments, "--skip-broken")
    assert (run / "report.md").is_file()


def test_the_card_of_a_run_without_labels(shrink, images, tmp_path):
    from sidt.runs.card import card
    from sidt.runs.config import read_config

    path = tmp_path / "seven.safetensors"
    save_file(trained(7).state_dict(), path)
    _, run = shrink("vit_tiny_patch16_224", "--images", images, "--budget.params", "0.6", "--checkpoint", path)
    text = card(sidt.load(run / "sliced"), "me/small", run, read_config(run / "config.yaml"), [])
    assert "Same answer as dense on the 16 test images" in text and "metric" not in text
    assert "Its images: 16 x 16, bicubic, crop 0.9 (center), mean 0.5, 0.5, 0.5" in text
