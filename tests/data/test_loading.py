"""The data sets, their splits, their layouts and what is said about bad ones."""

import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

from sidt.data import pixels
from sidt.data import splits as splits_module
from sidt.data.loading import load_data
from sidt.data.preparation import DataConfig
from sidt.errors import InputError
from sidt.training.batches import make_loader, rechunk

CLASSES = ("10", "9", "ape", "bee")  # timm alone would put 9 before 10


def write_images(root: Path, per_class: int = 12, size: int = 8, classes=CLASSES, splits=("train", "val")) -> Path:
    """Images whose red is the class, green the number and blue the split."""
    for blue, split in enumerate(splits):
        for red, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for green in range(per_class):
                pixels = np.full((size, size, 3), (red, green, blue), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{green}.png")
    return root


def to_tars(root: Path, target: Path) -> Path:
    target.mkdir()
    for split in root.iterdir():
        with tarfile.open(target / f"{split.name}.tar", "w") as tar:
            tar.add(split, split.name)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def raw(root: Path, **options) -> DataConfig:
    """Pixels come out as 0..255."""
    plain = {"image_size": 8, "augment": "none", "holdout": 0.25}
    return DataConfig(name="folder", root=root, mean=(0, 0, 0), std=(1 / 255,) * 3, **{**plain, **options})


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_digits_are_split_without_overlap_and_in_proportion():
    splits = load_data(DataConfig())
    parts = [splits.train, splits.holdout, splits.fresh, splits.test]
    assert [len(part) for part in parts] == [1149, 144, 144, 360]
    assert sorted(np.concatenate([part.indices for part in parts]).tolist()) == list(range(1797))
    for part in parts:
        counts = np.bincount(part.labels, minlength=10) / len(part)
        assert counts.min() > 0.08 and counts.max() < 0.12
    assert splits.classes == tuple("0123456789")
    assert (splits.calibration.indices == splits.train.indices).all()


def test_the_split_follows_the_seed_and_the_test_set_does_not():
    first, again, other = (load_data(DataConfig(seed=seed)) for seed in (0, 0, 1))
    assert (first.train.indices == again.train.indices).all()
    assert (first.train.indices != other.train.indices).any()
    assert (first.test.indices == other.test.indices).all()


def test_items_are_normalised_images_and_int_labels():
    splits = load_data(DataConfig())
    image, label = splits.calibration[5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and type(label) is int
    everything, _ = next(iter(make_loader(splits.calibration, len(splits.calibration))))
    assert abs(everything.mean()) < 0.02 and abs(everything.std() - 0.935) < 0.02
    assert splits.test.labels.tolist() == next(iter(make_loader(splits.test, 360)))[1].tolist()


def test_train_is_augmented_and_the_rest_is_not():
    splits = load_data(DataConfig())
    assert not torch.equal(splits.train[3][0], splits.train[3][0])
    for part in (splits.calibration, splits.holdout, splits.fresh, splits.test):
        assert torch.equal(part[3][0], part[3][0])


def test_crop_shifts_and_flip_mirrors():
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    seen = {(bool(x[0, 4, 3] > x[0, 4, 4]), int(x[0, 3, 3])) for x in pixels.crop(image, (1, 1), flip=True)}
    assert {flipped for flipped, _ in seen} == {True, False}
    centre = 1 + 3 * 8 + 3
    shifts = {centre + 8 * rows + columns for rows in (-1, 0, 1) for columns in (-1, 0, 1)}
    assert {value for flipped, value in seen if not flipped} == shifts
    assert {int(x[0, 3, 3]) for x in pixels.crop(image, (1, 1), flip=False)} == shifts


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_both_layouts_give_every_image_with_the_label_of_its_class(folder, tmp_path, layout):
    root = folder if layout == "folder" else to_tars(folder, tmp_path / "tars")
    splits = load_data(raw(root))
    assert splits.classes == CLASSES
    assert [len(part) for part in (splits.train, splits.holdout, splits.fresh)] == [24, 12, 12]
    seen = set()
    for part, blue in ((splits.train, 0), (splits.holdout, 0), (splits.fresh, 0), (splits.test, 1)):
        for image, label in part:
            pixel = tuple(image[:, 0, 0].round().int().tolist())
            assert pixel[0] == label and pixel[2] == blue
            seen.add(pixel)
    assert len(seen) == 2 * 4 * 12


def test_test_may_stand_in_for_val_and_images_are_resized(tmp_path):
    root = write_images(tmp_path, size=20, splits=("train", "test"))
    splits = load_data(raw(root, image_size=12))
    assert splits.test[0][0].shape == (3, 12, 12)
    for augment in ("imagenet", "crop-flip"):
        image, _ = load_data(raw(root, image_size=12, augment=augment)).train[0]
        assert image.shape == (3, 12, 12) and image.dtype == torch.float32


def test_cifar100_from_tars_has_its_own_statistics(folder, tmp_path):
    root = to_tars(folder, tmp_path / "tars")
    splits = load_data(DataConfig(name="cifar100", root=root, image_size=8, holdout=0.25))
    image, label = splits.test[0]
    assert image[0, 0, 0].item() == pytest.approx((label / 255 - 0.5071) / 0.2673, abs=1e-4)


def test_cifar100_from_torchvision(tmp_path, monkeypatch):
    class Stub:
        def __init__(self, root, train, download):
            assert root == str(tmp_path) and download
            self.data = np.full((40, 32, 32, 3), 255 if train else 0, dtype=np.uint8)
            self.targets, self.classes = [0, 1] * 20, ["a", "b"]

    monkeypatch.setattr(splits_module, "CIFAR100", Stub)
    splits = load_data(DataConfig(name="cifar100", root=tmp_path))
    assert [len(x) for x in (splits.train, splits.holdout, splits.fresh, splits.test)] == [32, 4, 4, 40]
    assert splits.calibration[0][0].min() > 0 > splits.test[0][0].max()


def test_cifar100_without_a_network(tmp_path, monkeypatch):
    def offline(root, train, download):
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(splits_module, "CIFAR100", offline)
    with pytest.raises(InputError) as error:
        load_data(DataConfig(name="cifar100", root=tmp_path))
    assert all(word in one_line(error) for word in (str(tmp_path), "no route", "root=", "network"))


def test_a_tar_is_read_by_workers_after_this_process_has_read_from_it(folder, tmp_path):
    splits = load_data(raw(to_tars(folder, tmp_path / "tars")))
    expected = [splits.test[i][0] for i in range(len(splits.test))]
    splits.test.pixels.known[:] = False  # read again
    images = torch.cat([images for images, _ in make_loader(splits.test, 4, workers=2)])
    assert torch.equal(images, torch.stack(expected))


def test_without_the_cache_images_are_the_same(folder, monkeypatch):
    cached = load_data(raw(folder))
    monkeypatch.setattr(pixels, "_CACHE_BYTES", 0)
    plain = load_data(raw(folder))
    assert plain.test.pixels.cache is None and cached.test.pixels.cache is not None
    assert all(torch.equal(cached.test[i][0], plain.test[i][0]) for i in range(len(plain.test)))


@pytest.mark.parametrize("holdout", [0.0, 0.5, -1.0, float("nan")])
def test_holdout_must_leave_training_data(holdout):
    with pytest.raises(InputError, match=r"holdout is .* between 0 and 0.5"):
        load_data(DataConfig(holdout=holdout))


def test_root_is_needed_and_must_hold_a_layout(tmp_path):
    for config, words in (
        (DataConfig(name="folder"), "no root"),
        (DataConfig(name="folder", root=tmp_path / "nowhere"), "nowhere does not exist"),
        (DataConfig(name="folder", root=tmp_path), "holds no images"),
    ):
        with pytest.raises(InputError, match=words) as error:
            load_data(config)
        assert "images" in one_line(error)


def test_an_empty_data_set_is_named(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "ape").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        load_data(raw(tmp_path))
    with pytest.raises(InputError, match=r"train\.tar holds no images"):
        load_data(raw(to_tars(tmp_path, tmp_path.parent / f"{tmp_path.name}-tars")))


@pytest.mark.parametrize("cut", [700, 512 * 4, 3, 0])
def test_a_truncated_tar_is_named(folder, tmp_path, cut):
    root = to_tars(folder, tmp_path / "tars")
    content = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(content[:cut])
    with pytest.raises(InputError, match=r"train\.tar") as error:
        load_data(raw(root))
    assert "copy it again" in one_line(error)


def test_a_damaged_tar_is_named(folder, tmp_path):
    root = to_tars(folder, tmp_path / "tars")
    (root / "train.tar").write_bytes(b"no tar at all" * 100 + bytes(1024))
    with pytest.raises(InputError, match=r"cannot read .*train\.tar"):
        load_data(raw(root))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_an_undecodable_image_is_named_in_one_line(tmp_path, layout, workers):
    root = write_images(tmp_path / "folder")
    bad = root / "val" / "ape" / "7.png"
    bad.write_bytes(bad.read_bytes()[:40])
    if layout == "tar":
        root = to_tars(root, tmp_path / "tars")
    splits = load_data(raw(root))
    with pytest.raises(InputError, match=r"cannot decode .*ape/7\.png") as error:
        list(make_loader(splits.test, 8, workers=workers))
    one_line(error)
    with pytest.raises(InputError, match=r"ape/7\.png") as error:  # any other loader, too
        list(DataLoader(splits.test, batch_size=8, num_workers=workers))
    one_line(error)


def test_differing_classes_are_named(tmp_path):
    root = write_images(tmp_path)
    (root / "val" / "bee").rename(root / "val" / "wasp")
    with pytest.raises(InputError, match="bee, wasp"):
        load_data(raw(root))


def test_images_outside_of_class_folders(tmp_path):
    root = write_images(tmp_path)
    (root / "train" / "ape" / "0.png").rename(root / "train" / "0.png")
    with pytest.raises(InputError, match="outside of any class folder"):
        load_data(raw(root))


def test_too_few_images_or_classes_to_split(tmp_path):
    root = write_images(tmp_path / "few", per_class=9)
    with pytest.raises(InputError, match=r"'10' has 9 training images, too few for holdout=0\.1"):
        load_data(raw(root, holdout=0.1))
    with pytest.raises(InputError, match=r"too few for holdout=0\.48"):
        load_data(raw(root, holdout=0.48))
    load_data(raw(root, holdout=0.12))
    with pytest.raises(InputError, match="one class only"):
        load_data(raw(write_images(tmp_path / "one", classes=("ape",))))


def test_std_must_be_positive():
    with pytest.raises(InputError, match="std"):
        load_data(DataConfig(std=(1, 0, 1)))


def test_a_loader_depends_on_its_seed_only():
    train = Subset(load_data(DataConfig()).train, range(0, 1000, 10))

    def passes(seed: int, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        loader = make_loader(train, 50, shuffle=True, seed=seed, workers=workers)
        return tuple(torch.cat([images for images, _ in loader]) for _ in range(2))  # type: ignore[return-value]

    first, second = passes(0)
    torch.manual_seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    again, again_second = passes(0)
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.equal(first, again) and torch.equal(second, again_second)
    assert torch.equal(first, passes(0, workers=2)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, passes(1)[0])


def test_random_transforms_follow_the_seed_with_and_without_workers(folder):
    train = load_data(raw(folder, augment="imagenet")).train
    first, again, parallel = (
        torch.cat([images for images, _ in make_loader(train, 8, seed=3, workers=workers)]) for workers in (0, 0, 2)
    )
    assert torch.equal(first, again) and torch.equal(first, parallel)


def test_a_loader_keeps_order_and_can_drop_the_last_batch():
    samples = TensorDataset(torch.arange(10.0), torch.arange(10))
    assert torch.cat([y for _, y in make_loader(samples, 4)]).tolist() == list(range(10))
    assert [len(y) for _, y in make_loader(samples, 4, drop_last=True)] == [4, 4]
    shuffled = torch.cat([y for _, y in make_loader(samples, 4, shuffle=True)]).tolist()
    assert shuffled != list(range(10)) and sorted(shuffled) == list(range(10))


@pytest.mark.parametrize("sizes", [[10], [3, 3, 4], [1] * 10, [0, 7, 3], [4, 4, 2]])
@pytest.mark.parametrize("size", [1, 4, 5, 10, 99])
def test_rechunk_regroups_in_order(sizes, size):
    images, targets = torch.arange(20.0).view(10, 2), torch.arange(10)
    stream = zip(images.split(sizes), targets.split(sizes), strict=True)
    groups = list(rechunk(stream, size))
    assert [len(x) for x, _ in groups[:-1]] == [size] * (len(groups) - 1)
    assert 1 <= len(groups[-1][0]) <= size
    assert torch.equal(torch.cat([x for x, _ in groups]), images)
    assert torch.equal(torch.cat([y for _, y in groups]), targets)


def test_rechunk_of_nothing_and_of_a_bad_size():
    assert list(rechunk([], 4)) == []
    with pytest.raises(InputError, match="group size is 0"):
        list(rechunk([], 0))
