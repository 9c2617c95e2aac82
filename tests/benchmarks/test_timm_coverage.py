"""The count of what works: which models are tried, how small, where they stop, and that it goes on where it was."""

import json

import pytest
import timm
import timm_coverage
import torch
from timm_coverage import attends, known, measured, rows_of, small_arguments, tried


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", True),
        ("vit_pwee_patch16_reg1_gap_256", True),
        ("resnet18", False),
        ("resnet50_clip", False),
    ],
)
def test_what_has_attention(name, expected):
    with torch.device("meta"):
        assert attends(timm.create_model(name)) == expected


def test_how_small():
    assert small_arguments("vit_tiny_patch16_224") == {"depth": 2, "img_size": 64, "num_classes": 10}
    assert small_arguments("xcit_nano_12_p8_224")["depth"] == 2
    assert small_arguments("swin_tiny_patch4_window7_224")["depths"] == (2, 2, 2, 2)


def test_one_that_works_and_ones_that_stop():
    assert tried("vit_tiny_patch16_224")["step"] == "works"
    other = tried("convit_tiny")
    assert other["step"] == "space" and "ConVit" in other["why"]
    assert tried("beit3_base_patch16_224")["step"] == "works"  # norms inside attention and MLP


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    state, asked = tmp_path / "state.jsonl", []
    answers = {"step": "works", "class": "vision_transformer.VisionTransformer", "attends": True}

    def answer(name):
        asked.append(name)
        if name == "vit_small_patch16_224":
            raise KeyboardInterrupt
        return {"name": name, **answers}

    monkeypatch.setattr(timm_coverage, "tried", answer)
    names = ["vit_base_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224"]
    with pytest.raises(KeyboardInterrupt):
        list(measured(names, state, frozenset()))
    assert len(list(measured(names, state, frozenset({"VisionTransformer"})))) == 2
    found = list(measured(names, state, frozenset()))
    assert asked == names and [one["step"] for one in found] == ["works", "build", "works"]
    assert found[1]["why"] == "the process ended" and len(known(state)) == 3
    assert json.loads(state.read_text().splitlines()[0])["why"] == "the process ended"  # as it was begun


def test_the_table():
    worked = {"name": "a", "class": "x.A", "attends": True, "step": "works"}
    stopped = {"name": "b", "class": "x.A", "attends": True, "step": "space", "why": "no | line"}
    other = {"name": "c", "class": "x.C", "attends": False}
    assert rows_of([worked, stopped, other]) == [["x.A", 2, 1, "space (1)", "b: no / line"]]
