"""Images as timm's own validation has them: the model's preprocessing, every mode and file, folders of every shape."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

from sidt.data.loading import broken_images, load_data
from sidt.data.preparation import DataConfig, prepared_for
from sidt.data.sources import as_rgb
from sidt.errors import InputError
from sidt.training.batches import make_loader

HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(seed: int, width: int = 40, height: int = 28, mode: str = "RGB") -> Image.Image:
    """A smooth random picture: resizing it in two ways gives two pictures."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def folder_of(root: Path, count: int = 12) -> Path:
    """train/ and val/ of two classes, with pictures of every shape and kind that timm reads."""
    kinds = {
        "cat": [("RGB", "png"), ("L", "png"), ("RGBA", "png")],
        "dog": [("CMYK", "jpg"), ("RGB", "JPG"), ("P", "png")],
    }
    for split in ("train", "val"):
        for name, of in kinds.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                mode, suffix = of[i % 3]
                size = (40, 28) if i % 2 else (22, 50)
                picture(i, *size, mode).save(root / split / name / f"ä b'{i}.{suffix}")
    rotated = picture(99, 50, 20)
    exif = rotated.getexif()
    exif[0x0112] = 6  # turned by a quarter
    rotated.save(root / "val" / "dog" / "turned.jpeg", exif=exif)
    (root / "val" / "dog" / "link.png").symlink_to(root / "val" / "cat" / "ä b'0.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures"))


def tiny(**cfg) -> torch.nn.Module:
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **args, pretrained_cfg_overlay=cfg).eval()


@pytest.mark.parametrize("statistics", [HALVES, IMAGENET])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode"), [(0.875, "center"), (0.9, "squash"), (1.0, "border"), (0.9, "border")]
)
def test_images_and_answers_are_those_of_timms_validation(pictures, statistics, interpolation, crop_pct, crop_mode):
    own = {**statistics, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    model = tiny(**own, input_size=(3, 32, 32))
    says = resolve_data_config({}, model=model, use_test_size=True)
    theirs = create_loader(
        create_dataset("", root=str(pictures / "val")),
        input_size=says["input_size"],
        batch_size=7,
        use_prefetcher=False,
        **{key: says[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    names = [Path(name).as_posix() for name in theirs.dataset.filenames()]
    wanted = dict(zip(names, torch.cat([images for images, _ in theirs]), strict=True))
    config = prepared_for(DataConfig(name="folder", root=pictures, holdout=0.2), model.pretrained_cfg)
    assert config.crop_mode == crop_mode and config.size == (32, 32)
    test = load_data(config).test
    images = torch.cat([images for images, _ in make_loader(test, 5)])
    files = [test.pixels.source.files[i].name for i in test.indices]
    assert sorted(files) == sorted(names) and len(files) == 26
    expected = torch.stack([wanted[name] for name in files])
    assert (images - expected).abs().max() < 2e-6
    with torch.no_grad():
        assert torch.equal(model(images).argmax(1), model(expected).argmax(1))


def test_what_the_config_says_wins_and_data_sets_keep_their_own():
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    folder = prepared_for(DataConfig(name="folder", std=(1, 1, 1), crop_pct=0.5), cfg)
    assert (folder.mean, folder.std, folder.crop_pct) == ((0.5, 0.5, 0.5), (1, 1, 1), 0.5)
    assert (folder.size, folder.interpolation, folder.crop_mode) == ((224, 224), "bicubic", "center")
    assert prepared_for(folder, {"mean": (0, 0, 0)}) == folder
    digits = prepared_for(DataConfig(name="digits"), cfg)
    assert digits.size == (32, 32) and digits.mean == (0.3053,) * 3
    assert prepared_for(DataConfig(name="cifar100"), cfg, published=True).std == (0.5, 0.5, 0.5)


def test_black_is_what_the_weights_want(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{i}.png")
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    data = load_data(prepared_for(DataConfig(name="folder", root=tmp_path, holdout=0.2), cfg))
    assert data.test[0][0].shape == (3, 224, 224) and (data.test[0][0] == -1).all()


def test_images_that_are_not_square(tmp_path):
    root = folder_of(tmp_path)
    data = load_data(DataConfig(name="folder", root=root, image_size=(16, 24), holdout=0.2, augment="crop-flip"))
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 16, 24)


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path):
    grey = np.full((4, 4), 8000, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as image:
        assert np.asarray(as_rgb(image)).max() == round(8000 / 65535 * 255) == np.asarray(as_rgb(image)).min()
    with pytest.raises(ValueError, match="32 bits"):
        as_rgb(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)))
    with pytest.raises(ValueError, match="floats"):
        as_rgb(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))


@pytest.mark.parametrize("tar", [False, True])
def test_folders_inside_of_class_folders_are_no_classes(tmp_path, tar):
    for split in ("train", "val"):
        for name, year in (("cat", "2022"), ("dog", "2023")):
            (tmp_path / "f" / split / name / year).mkdir(parents=True)
            (tmp_path / "f" / split / name / ".cache").mkdir()
            for i in range(6):
                picture(i).save(tmp_path / "f" / split / name / year / f"{i}.png")
    (tmp_path / "f" / "train" / ".ipynb_checkpoints").mkdir()
    root = tmp_path / "f"
    if tar:
        root = tmp_path / "t"
        root.mkdir()
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}.tar", "w") as archive:
                archive.add(tmp_path / "f" / split, split)
    data = load_data(DataConfig(name="folder", root=root, image_size=8, holdout=0.2))
    assert data.classes == ("cat", "dog") and data.test.labels.tolist() == [0] * 6 + [1] * 6


def test_every_kind_of_file_is_read_or_named(tmp_path):
    for name, suffix in (("cat", "png"), ("dog", "webp"), ("eel", "BMP"), ("fox", "tiff"), ("gnu", "gif")):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(i).save(tmp_path / name / f"{i}.{suffix}")
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    assert load_data(DataConfig(name="folder", root=tmp_path, image_size=8)).classes == (
        "cat",
        "dog",
        "eel",
        "fox",
        "gnu",
    )
    for i in range(3):
        (tmp_path / "dog" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"3 \.heic.*convert"):
        load_data(DataConfig(name="folder", root=tmp_path, image_size=8))


def test_a_class_without_images_is_named(tmp_path):
    root = folder_of(tmp_path)
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "notes.txt").write_text("none yet")
    with pytest.raises(InputError, match="eel holds no image that is read"):
        load_data(DataConfig(name="folder", root=root))


def test_one_folder_of_images_has_no_labels_and_a_fifth_is_the_test_set(tmp_path):
    for i in range(20):
        picture(i).save(tmp_path / f"{i}.png")
    data = load_data(DataConfig(name="folder", root=tmp_path, image_size=8))
    parts = [data.train, data.holdout, data.fresh, data.test]
    assert [len(part) for part in parts] == [12, 2, 2, 4] and data.classes == ()
    assert sorted(np.concatenate([part.indices for part in parts]).tolist()) == list(range(20))
    assert (data.test.labels == -1).all()


def test_one_folder_of_class_folders(tmp_path):
    root = folder_of(tmp_path) / "val"
    data = load_data(DataConfig(name="folder", root=root, image_size=8))
    assert data.classes == ("cat", "dog") and len(data.test) == 6 and set(data.train.labels) == {0, 1}
    blind = load_data(DataConfig(name="folder", root=root, image_size=8, labels=False))
    assert blind.classes == () and len(blind.test) == 6


def test_some_of_the_classes(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(8):
            picture(i).save(tmp_path / name / f"{i}.png")
    whole = DataConfig(name="folder", root=tmp_path, image_size=8)
    data = load_data(whole.model_copy(update={"classes": ("d", "b")}))
    assert data.classes == ("b", "d") and data.rows == (1, 3)
    seen = {(data.test.pixels.source.files[i].name[0], int(n)) for i, n in enumerate(data.test.pixels.source.labels)}
    assert seen == {("b", 0), ("d", 1)}
    for wrong in (("b", "x"), ("b",)):
        with pytest.raises(InputError, match="its classes are a, b, c, d"):
            load_data(whole.model_copy(update={"classes": wrong}))


def test_broken_images_are_all_named_and_left_out_only_if_asked(tmp_path):
    for i in range(20):
        picture(i).save(tmp_path / f"{i}.png")
    for i in (3, 7, 11):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:60])
    config = DataConfig(name="folder", root=tmp_path, image_size=8)
    reasons = broken_images(load_data(config))
    assert sorted(reasons) == sorted(str(tmp_path / f"{i}.png") for i in (3, 7, 11))
    rest = load_data(config.model_copy(update={"skip_broken": True}))
    assert sum(len(part) for part in (rest.train, rest.holdout, rest.fresh, rest.test)) == 17
    assert broken_images(rest) == []
