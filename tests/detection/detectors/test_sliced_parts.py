"""Sliced necks and heads on disk: the same again, sliced again, and what does not fit is refused."""

import pytest
from backbones import random_plan
from mmdet.registry import MODELS
from small_heads import FPN, MODELS_OF, SIZE, channels, made, same

from sidt.detection.detectors.checkpoints import CONFIG, load_detector, save_detector
from sidt.detection.detectors.space import detector_space
from sidt.errors import InputError
from sidt.files import read_json, write_json
from sidt.space.plan import load_plan
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model


@pytest.fixture(params=MODELS_OF)
def name(request):
    return request.param


def test_saved_and_loaded_is_the_same(name, tmp_path):
    detector, config, space = made(name)
    first = slice_model(detector, random_plan(space, 0))
    save_detector(first, config, tmp_path / "first", tuple("abcde"))
    loaded, own = load_detector(tmp_path / "first")
    assert same(first, loaded) and loaded.sidt_plan.sizes == first.sidt_plan.sizes
    assert own.model.neck.type == "SlicedPart" and own.model.neck.dense.type == config.model.neck.type
    for outside in (False, True):  # and again, the backbone alone or all of it
        inner = detector_space(loaded, own.model, SIZE, outside=outside)
        again = slice_model(loaded, random_plan(inner, 1))
        save_detector(again, own, tmp_path / "again", tuple("abcde"))
        twice, last = load_detector(tmp_path / "again")
        assert same(again, twice) and twice.sidt_plan.sizes == again.sidt_plan.sizes
        save_detector(twice, last, tmp_path / "copy", tuple("abcde"))
        assert (tmp_path / "copy" / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()


def test_the_backbone_takes_its_part_of_a_plan(tmp_path):
    detector, _, space = made("ATSS")
    plan = random_plan(space, 0)
    plan.save(tmp_path / "plan.json")
    inner = space_for(detector.backbone, SIZE)
    part = load_plan(tmp_path / "plan.json", inner, part=True)
    with pytest.raises(InputError, match="made for another model"):
        load_plan(tmp_path / "plan.json", inner)
    assert set(part.sizes) == set(plan.sizes) - set(channels(space))
    data = read_json(tmp_path / "plan.json")
    data["channels"] = []
    write_json(tmp_path / "plan.json", data)
    with pytest.raises(InputError, match="made for another model"):
        load_plan(tmp_path / "plan.json", inner, part=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("channels", 3), ("channels", ["nowhere"]), ("channels", [["a"]]), ("keep", {}), ("dense", {})],
)
def test_a_damaged_plan_is_refused(key, value, tmp_path):
    detector, config, space = made("ATSS")
    save_detector(slice_model(detector, random_plan(space, 0)), config, tmp_path, tuple("abcde"))
    write_json(tmp_path / "plan.json", {**read_json(tmp_path / "plan.json"), key: value})
    with pytest.raises(InputError):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("'cls_convs.0.conv.weight'", "'cls_convs.7.conv.weight'", "not there"),
        ("gn.num_groups", "gn.num_grous", "has no"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(old, new, says, tmp_path):
    detector, config, space = made("ATSS")
    save_detector(slice_model(detector, random_plan(space, 0)), config, tmp_path, tuple("abcde"))
    text = (tmp_path / CONFIG).read_text()
    assert old.replace("'", '"') in text or old in text
    (tmp_path / CONFIG).write_text(text.replace(old, new))
    with pytest.raises(InputError, match=says):
        load_detector(tmp_path)


def test_a_size_of_a_part_must_fit():
    with pytest.raises(InputError, match="cannot be cut"):
        MODELS.build(
            dict(
                type="SlicedPart", dense=FPN, shapes={"fpn_convs.0.conv.weight": [17, None, None, None]}, attributes={}
            )
        )
