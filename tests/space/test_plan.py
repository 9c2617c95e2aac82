"""The plan file: what round trips, and what is said about one that cannot be used."""

import copy
import json

import numpy as np
import pytest
from backbones import BACKBONES, DISTILLED, VIT_TINY, dense, random_plan

from sidt.space.plan import DimensionPlan, load_plan, plan_from_json
from sidt.space.space import space_for
from sidt.surgery.slicing import slice_model

SPACE = dense(VIT_TINY)[1]
FIXED = dense(BACKBONES[9])[1]  # qk norm: q and k must stay whole


def good() -> dict:
    return random_plan(SPACE, 0).to_json()


def test_round_trip(tmp_path):
    plan = random_plan(SPACE, 0)
    plan.save(tmp_path / "new" / "plan.json")
    again = load_plan(tmp_path / "new" / "plan.json", SPACE)
    assert again.sizes == plan.sizes != SPACE.sizes
    assert all(np.array_equal(again.keep[name], plan.keep[name]) for name in SPACE.dimensions)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_what_is_left_out_is_kept_whole_and_order_does_not_matter():
    plan = DimensionPlan(SPACE, {"hidden.0": [5, 0, 3]})
    assert plan.keep["hidden.0"].tolist() == [0, 3, 5]
    assert plan.sizes == SPACE.sizes | {"hidden.0": 3}
    assert plan.keep["qk.1"].shape == (3, 64)


def test_fewer_heads_need_fewer_rows(refused):
    assert DimensionPlan(SPACE, {"heads.0": [2]}).keep["v.0"].shape == (1, 64)
    with refused("qk.0", "[3, 2]", "1 lists"):
        DimensionPlan(SPACE, {"heads.0": [2], "qk.0": [[0, 1]] * 3})


@pytest.mark.parametrize("rows", [[], np.empty((0, 5), dtype=int), np.empty((0, 64)), None], ids=str)
def test_no_heads_have_no_rows(rows, tmp_path):
    plan = DimensionPlan(SPACE, {"heads.0": [], "hidden.1": []} | ({} if rows is None else {"qk.0": rows}))
    plan.save(tmp_path / "plan.json")
    for one in (plan, load_plan(tmp_path / "plan.json", SPACE)):
        assert one.sizes == SPACE.sizes | {"heads.0": 0, "qk.0": 1, "v.0": 1, "hidden.1": 0}
        assert all(one.keep[name].shape == (0, 1) for name in ("qk.0", "v.0"))
        assert all(kept.dtype == np.int64 for kept in one.keep.values())
    assert json.loads((tmp_path / "plan.json").read_text())["keep"]["v.0"] == []


def test_no_heads_with_rows(refused):
    with refused("qk.0", "[3, 2]", "0 lists"):
        DimensionPlan(SPACE, {"heads.0": [], "qk.0": [[0, 1]] * 3})


def test_copies_of_a_model_share_its_plan():
    plan = random_plan(SPACE, 0)
    assert copy.deepcopy(plan) is plan


def test_then():
    first = DimensionPlan(SPACE, {"embed": range(10, 20), "heads.0": [0, 2], "v.0": [[1, 5, 9], [0, 2, 4]]})
    sliced = dense(VIT_TINY)[0]
    later = DimensionPlan(space_for(slice_model(sliced, first)), {"embed": [0, 9], "heads.0": [1], "v.0": [[0, 2]]})
    both = first.then(later)
    assert both.space is SPACE
    assert [both.keep[n].tolist() for n in ("embed", "heads.0", "v.0")] == [[10, 19], [2], [[0, 4]]]


def test_then_from_and_to_no_units():
    first = DimensionPlan(SPACE, {"heads.0": [0, 2], "qk.0": [[1, 5], [0, 2]], "hidden.1": []})
    space = space_for(slice_model(dense(VIT_TINY)[0], first))
    assert first.then(DimensionPlan(space, {})).sizes == first.sizes
    both = first.then(DimensionPlan(space, {"heads.0": [], "heads.1": [1], "hidden.0": []}))
    assert both.sizes == first.sizes | {"heads.0": 0, "qk.0": 1, "v.0": 1, "heads.1": 1, "hidden.0": 0}


def test_then_needs_a_plan_on_the_sliced_model(refused):
    plan = random_plan(SPACE, 0)
    with refused("other sizes"):
        plan.then(plan)


@pytest.mark.parametrize("seed", range(4))
def test_after_undoes_then(seed, refused):
    first = random_plan(SPACE, seed)
    space = space_for(slice_model(dense(VIT_TINY)[0], first))
    later = random_plan(space, seed + 10)
    assert first.then(later).after(first, space).to_json() == later.to_json()
    with refused("has no longer"):
        DimensionPlan(SPACE, {}).after(first, space)


def test_after_with_no_units():
    first = DimensionPlan(SPACE, {"heads.0": [0, 2], "hidden.1": []})
    space = space_for(slice_model(dense(VIT_TINY)[0], first))
    later = DimensionPlan(space, {"heads.0": [], "qk.1": [[0], [1], [0]]})
    assert first.then(later).after(first, space).to_json() == later.to_json()


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("hidden.0", [0, 768], ["hidden.0", "768", "0..767"]),
        ("hidden.0", [-1, 2], ["hidden.0", "-1", "0..767"]),
        ("hidden.0", [7, 3, 7], ["hidden.0", "7", "twice"]),
        ("embed", [], ["embed", "no unit", "heads and mlp"]),
        ("hidden.0", 3, ["hidden.0", "[]", "one list"]),
        ("hidden.0", [[1, 2]], ["hidden.0", "[1, 2]", "one list"]),
        ("hidden.0", [0, [1]], ["hidden.0", "different lengths"]),
        ("hidden.0", [0.0, 1.5], ["hidden.0", "whole numbers", "float"]),
        ("hidden.0", ["0", "1"], ["hidden.0", "whole numbers"]),
        ("hidden.0", [True, False], ["hidden.0", "whole numbers", "bool"]),
        ("hidden.0", [0, None], ["hidden.0", "whole numbers"]),
        ("hidden.0", {"0": 1}, ["hidden.0"]),
        ("hidden.0", None, ["hidden.0"]),
        ("hidden.0", [2**70], ["hidden.0"]),
        ("qk.0", [[0, 1], [0], [0, 1]], ["qk.0", "different lengths"]),
        ("qk.0", [[0, 1], [0, 1]], ["qk.0", "[2, 2]"]),
        ("qk.0", [[], [], []], ["qk.0", "no unit"]),
        ("qk.0", [], ["qk.0", "[0]", "3 lists"]),
        ("heads.0", [[]], ["heads.0", "[1, 0]", "one list"]),
        ("qk.0", [[0, 1], [0, 64], [0, 1]], ["qk.0", "64", "0..63"]),
        ("qk.0", [[0, 1], [5, 5], [0, 1]], ["qk.0", "5", "twice"]),
        ("hiden.0", [0], ["'hiden.0'", "no dimension", "embed"]),
        ("hidden.2", [0], ["'hidden.2'", "no dimension"]),
    ],
)
def test_bad_indices(name, kept, words, refused, tmp_path):
    data = DimensionPlan(SPACE, {}).to_json()
    data["keep"][name] = kept
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with refused(*words):
        load_plan(tmp_path / "plan.json", SPACE)


def test_a_dimension_that_must_stay_whole(refused):
    assert DimensionPlan(FIXED, {"heads.0": [0]}).sizes["qk.0"] == 64
    assert DimensionPlan(FIXED, {"heads.0": []}).sizes["qk.0"] == 1  # nothing is left to take statistics over
    with refused("qk.0", "stay whole"):
        DimensionPlan(FIXED, {"qk.0": [[0, 1]] * 3})


@pytest.mark.parametrize("text", ["", "{", "not json", '{"format": "sidt-plan-1", "keep": {"embed": [0, 1'])
def test_a_damaged_file(text, refused, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with refused("plan.json", "not valid JSON", "truncated"):
        load_plan(tmp_path / "plan.json", SPACE)


def test_a_file_that_is_nested_too_deep(refused, tmp_path):
    (tmp_path / "plan.json").write_text("[" * 20_000 + "]" * 20_000)
    with refused("plan.json", "nested too deep"):
        load_plan(tmp_path / "plan.json", SPACE)


def test_a_file_that_says_something_twice(refused, tmp_path):
    text = json.dumps(DimensionPlan(SPACE, {}).to_json())
    (tmp_path / "plan.json").write_text(text.replace('"keep":', '"keep": {}, "keep":'))
    with refused("plan.json", "'keep' is there twice"):
        load_plan(tmp_path / "plan.json", SPACE)


def test_a_file_that_is_not_text(refused, tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with refused("plan.json", "not valid JSON"):
        load_plan(tmp_path / "plan.json", SPACE)


def test_a_missing_file(refused, tmp_path):
    with refused("plan.json", "No such file"):
        load_plan(tmp_path / "plan.json", SPACE)
    with refused(tmp_path.name, "directory"):
        load_plan(tmp_path, SPACE)


@pytest.mark.parametrize(
    "data", [[], 3, "plan", None, {}, {"keep": {}}, good() | {"format": "v2"}, good() | {"keep": []}]
)
def test_json_that_is_no_plan(data, refused):
    with refused("plan.json", "not a dimension plan", "sidt-plan-1"):
        plan_from_json(data, SPACE, "plan.json")


def test_a_plan_for_another_model(refused):
    distilled = dense(DISTILLED)[1]
    with refused("another model", "'VisionTransformer'", "'VisionTransformerDistilled'"):
        plan_from_json(good(), distilled)
    with refused("another model", "embed", "384", "192"):
        plan_from_json(random_plan(dense(BACKBONES[3])[1], 0).to_json(), SPACE)
    with refused("another model", "hidden.1", "None", "768"):
        plan_from_json(good() | {"dense": {n: s for n, s in SPACE.sizes.items() if n != "hidden.1"}}, SPACE)
    with refused("another model", "extra", "4", "None"):
        plan_from_json(good() | {"dense": SPACE.sizes | {"extra": 4}}, SPACE)
    with refused("another model"):
        plan_from_json(good() | {"dense": None}, SPACE)
