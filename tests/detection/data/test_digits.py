"""The digits detection set: what is on disk, what is refused, and that the configs for it build and learn."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from sidt.detection.data.digits import write_digits

CONFIGS = Path(__file__).parents[3] / "configs" / "detection"
SET = dict(train=40, val=20, size=64, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert "40 + 20" in write_digits(folder, **SET)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def coco(folder: Path, split: str) -> COCO:
    return COCO(str(folder / "annotations" / f"{split}.json"))


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    write_digits(tmp_path / "again", **SET)
    write_digits(tmp_path / "other", **{**SET, "seed": 4})
    assert contents(tmp_path / "again") == contents(folder)
    names = [name for name, data in contents(tmp_path / "other").items() if data == contents(folder)[name]]
    assert names == []


def test_an_image_does_not_depend_on_how_many_there_are(folder, tmp_path):
    write_digits(tmp_path / "few", **{**SET, "train": 3})
    few, whole = contents(tmp_path / "few"), contents(folder)
    assert all(few[f"train/{name}"] == whole[f"train/{name}"] for name in ("000001.png", "000003.png"))
    assert all(few[name] == whole[name] for name in whole if name.startswith("val/"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_image_is_there_and_they_differ(folder, split):
    data = coco(folder, split)
    files = sorted(path.name for path in (folder / split).iterdir())
    assert sorted(image["file_name"] for image in data.dataset["images"]) == files
    assert len(files) == SET[split]
    pixels = []
    for name in files:
        with Image.open(folder / split / name) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            pixels.append(image.tobytes())
    assert len(set(pixels)) == len(files)


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_are_valid(folder, split):
    data = coco(folder, split)
    assert [(item["id"], item["name"]) for item in data.dataset["categories"]] == [(i + 1, str(i)) for i in range(10)]
    for item in data.dataset["annotations"]:
        x, y, width, height = item["bbox"]
        assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= 64 and y + height <= 64
        mask = data.annToMask(item)
        assert coco_mask.toBbox(data.annToRLE(item)).tolist() == item["bbox"]
        assert mask.shape == (64, 64) and mask.sum() == item["area"] > 0
        assert item["iscrowd"] == 0


def test_masks_lie_on_the_strokes_and_on_no_other(folder):
    data = coco(folder, "val")
    for image in data.dataset["images"]:
        items = data.imgToAnns[image["id"]]
        masks = [data.annToMask(item).astype(bool) for item in items]
        assert np.sum(masks, axis=0).max(initial=0) <= 1
        with Image.open(folder / "val" / image["file_name"]) as file:
            pixels = np.asarray(file, dtype=float)
        for mask in masks:  # strokes are brighter than canvases
            assert pixels[mask].mean() > pixels[~np.any(masks, axis=0)].mean()


def test_labels_are_those_of_the_digits_and_no_digit_is_in_both_splits(folder):
    target = load_digits().target
    used = {}
    for split in ("train", "val"):
        items = coco(folder, split).dataset["annotations"]
        assert all(item["category_id"] == target[item["digit"]] + 1 for item in items)
        used[split] = {item["digit"] for item in items}
    assert not used["train"] & used["val"]


def test_images_hold_no_digit_to_eight_and_digits_stay_visible(folder):
    counts = [len(coco(folder, "train").imgToAnns[image + 1]) for image in range(40)]
    assert [index for index, count in enumerate(counts) if count == 0] == [19, 39]
    assert max(counts) > 4 and max(counts) <= 8
    sizes = [item["bbox"][3] for item in coco(folder, "train").dataset["annotations"]]
    assert min(sizes) >= 6 and max(sizes) <= 40 and max(sizes) > 2 * min(sizes)


def test_a_set_that_is_there_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "already" in write_digits(folder, **SET)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    write_digits(tmp_path / "empty", train=1, val=1, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty" / "val" / "000001.png").is_file()


def test_other_contents_are_refused(folder, tmp_path, refused):
    with refused(folder, "train 40 not 41"):
        write_digits(folder, **{**SET, "train": 41})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with refused("photos", "something other"):
        write_digits(tmp_path / "photos")
    with refused("cat.jpg", "something other"):
        write_digits(tmp_path / "photos" / "cat.jpg")
    with refused("cat.jpg"):
        write_digits(tmp_path / "photos" / "cat.jpg" / "digits")
    (tmp_path / "photos" / "digits.json").write_text("{")
    with refused("digits.json", "JSON"):
        write_digits(tmp_path / "photos")
    assert contents(tmp_path / "photos") == {"cat.jpg": b"", "digits.json": b"{"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("train", 0), ("val", -1), ("size", 47), ("size", 4096), ("seed", -1), ("train", 2.5), ("val", True)],
)
def test_arguments_are_checked(tmp_path, refused, name, value):
    with refused(name, value):
        write_digits(tmp_path / "digits", **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    saved = []
    save = Image.Image.save

    def interrupted(image, path, *rest, **options):
        if len(saved) == 5:
            raise error
        saved.append(path)
        save(image, path, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises((KeyboardInterrupt, ValueError), match="No space" if isinstance(error, OSError) else None):
        write_digits(tmp_path / "digits", **SET)
    assert len(saved) == 5 and saved[0].parents[1] != tmp_path / "digits"
    assert not list(tmp_path.iterdir())


# --- the configs for it --------------------------------------------------------------------------------------------


@pytest.fixture(params=["digits_swin", "digits_vit"])
def config(request) -> Config:
    register_all_modules(init_default_scope=True)
    return Config.fromfile(CONFIGS / f"{request.param}.py")


def test_configs_inherit_from_mmdetection_and_share_all_but_the_model(config):
    assert config.default_scope == "mmdet" and config.default_hooks.timer.type == "IterTimerHook"
    other = Config.fromfile(CONFIGS / "digits_swin.py")
    assert {k for k in config if config[k] != other[k]} <= {"model"}
    assert config.train_dataloader.dataset.data_root == config.data_root


def test_the_detector_builds_and_learns_on_a_batch(config, folder):
    detector = MODELS.build(config.model)
    detector.init_weights()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.named_children()}
    assert sizes["backbone"] > 0.75 * sum(sizes.values()), "pruning the backbone must matter"
    dataset = config.train_dataloader.dataset.to_dict() | {"data_root": str(folder)}
    data = DATASETS.build(dataset)
    assert len(data) == 40, "images without digits are kept"
    batch = pseudo_collate([data[index] for index in (0, 1, 19)])
    assert [len(sample.gt_instances) for sample in batch["data_samples"]][2] == 0
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    history = []
    for _ in range(6):
        losses = detector(**detector.data_preprocessor(batch, training=True), mode="loss")
        loss, _ = detector.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
        optimizer.step()
        history.append(float(loss.detach()))
    assert np.isfinite(history).all() and history[-1] < 0.9 * history[0]
    detector.eval()
    with torch.no_grad():
        found = detector(**detector.data_preprocessor(batch, training=False), mode="predict")
    boxes = torch.cat([sample.pred_instances.bboxes for sample in found])
    assert len(found) == 3 and boxes.isfinite().all() and boxes.min() >= 0 and boxes.max() <= 64


def test_the_classes_of_the_config_are_the_categories_of_the_set(config, folder):
    dataset = config.val_dataloader.dataset.to_dict() | {"data_root": str(folder)}
    data = DATASETS.build(dataset)
    items = coco(folder, "val").imgToAnns
    found = [[instance["bbox_label"] + 1 for instance in data.get_data_info(i)["instances"]] for i in range(len(data))]
    assert found == [[item["category_id"] for item in items[i + 1]] for i in range(20)]


def test_the_set_can_be_moved(folder, tmp_path):
    """What says that a set is there does not hold its place."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert "already" in write_digits(moved, **SET)
    assert json.loads((moved / "digits.json").read_text())["train"] == 40
