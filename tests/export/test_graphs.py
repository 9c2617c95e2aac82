"""Exported files compute what the model computes, in ONNX Runtime and in torch, or are not written."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from backbones import (
    BACKBONES,
    DISTILLED,
    MMDET_SWIN,
    PVT,
    SWIN,
    SWIN_V2,
    VIT_TINY,
    Backbone,
    dense,
    random_plan,
    sublayers,
)
from torch import nn
from torch.testing import assert_close

import sidt
from sidt.export import agreement
from sidt.export import onnx as exporting
from sidt.surgery.slicing import slice_model

# One of each family, with few layers: the exporter's time grows with them.
STAGES = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4), "sr_ratios": (4, 2), "mlp_ratios": (4, 4)}
WINDOWS = {"depths": (2,), "embed_dim": 32, "num_heads": (4,)}
FAMILIES = (
    VIT_TINY,
    Backbone(SWIN.name, WINDOWS | {"img_size": 56}, label="small"),
    Backbone(SWIN_V2.name, WINDOWS | {"img_size": 64}, label="small"),
    Backbone(PVT.name, STAGES, (3, 32, 32), label="small"),
)
ALL = [*FAMILIES, *(pytest.param(b, marks=pytest.mark.slow) for b in BACKBONES if b not in FAMILIES)]


def sliced(backbone):
    """q/k and v sizes differ everywhere, one block has no heads and one no MLP."""
    model, space = dense(backbone)
    return slice_model(model, random_plan(space, 0, empty=sublayers(space, "apart")))


def by_runtime(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]


@pytest.mark.parametrize("backbone", ALL, ids=str)
def test_every_backbone_leaves_as_onnx_and_as_a_program(backbone, tmp_path):
    """MMDetection's Swin counts the images of a batch in Python, so that its file takes one image."""
    small, size = sliced(backbone), dense(backbone)[1].trace.input_size
    dynamic = "mmdet-Swin" not in str(backbone)
    said = sidt.export.to_onnx(small, tmp_path / "a.onnx", input_size=size, dynamic_batch=dynamic)
    again = sidt.export.to_torch(small, tmp_path / "a.pt2", input_size=size, dynamic_batch=dynamic)
    assert said.error < 1e-5 and again.error < 1e-5
    empty = [t.name for t in onnx.load(tmp_path / "a.onnx").graph.initializer if 0 in t.dims]
    assert not empty, "many versions of ONNX Runtime cannot multiply by nothing"
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    for batch in (1, 4, 3) if dynamic else (1,):
        images = backbone.images(batch)
        expected = agreement.outputs_of(small, images)
        for seen in (by_runtime(tmp_path / "a.onnx", images), agreement.outputs_of(loaded, images)):
            assert_close(tuple(seen), expected, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.pt2"]


@pytest.mark.slow
def test_a_batch_that_the_model_counts_in_python_is_refused(tmp_path, refused):
    small, size = sliced(MMDET_SWIN), dense(MMDET_SWIN)[1].trace.input_size
    with refused("batch of 1", "without a dynamic batch"):
        sidt.export.to_onnx(small, tmp_path / "a.onnx", input_size=size, dynamic_batch=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backbone", [VIT_TINY, pytest.param(SWIN, marks=pytest.mark.slow)], ids=str)
def test_fewer_bytes_for_a_larger_error(backbone, tmp_path):
    model = sliced(backbone)
    found = {p: sidt.export.to_onnx(model, tmp_path / p, precision=p) for p in ("float32", "fp16", "int8")}
    assert found["float32"].error < 1e-5 < found["fp16"].error < found["int8"].error < 0.25
    weights = sum(p.nbytes for p in model.parameters())
    assert weights < len(found["float32"].data) < 1.3 * weights
    assert len(found["fp16"].data) < 0.6 * len(found["float32"].data)
    assert len(found["int8"].data) < 0.75 * len(found["float32"].data)  # its convolution and embeddings stay float32
    kinds = {p: onnx.load(tmp_path / p) for p in found}
    assert {t.data_type for t in kinds["fp16"].graph.initializer} & {onnx.TensorProto.FLOAT16}
    assert any(node.op_type == "MatMulInteger" for node in kinds["int8"].graph.node)
    for precision, proto in kinds.items():
        assert [x.name for x in (*proto.graph.input, *proto.graph.output)] == ["images", "output"], precision
        assert all(x.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for x in proto.graph.output), precision


def test_one_image_is_what_a_file_takes_by_default(tmp_path):
    sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx", opset=18)
    proto = onnx.load(tmp_path / "a.onnx")
    assert {entry.version for entry in proto.opset_import if not entry.domain} == {18}
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 64]
    assert str(sys.prefix).encode() not in (tmp_path / "a.onnx").read_bytes(), "no paths of this machine"


def test_the_model_stays_as_it_is(tmp_path):
    model = sliced(DISTILLED).double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sidt.export.to_torch(model, tmp_path / "a.pt2")
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad == (p.numel() > 0) for p in model.parameters())


def test_outputs_that_differ_are_refused(tmp_path, refused, monkeypatch):
    """What the exporter wrote is changed under its hands: one weight is another number, or none."""
    monkeypatch.setattr(exporting, "_half", lambda proto: changed(proto, 7.0))
    with refused("fp16 export differ", "0.02", "nothing is written"):
        sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx", precision="fp16")
    monkeypatch.setattr(exporting, "_quantised", lambda proto: changed(proto, np.nan))
    (tmp_path / "a.onnx").write_text("old")
    with refused("int8 export differ", "inf"):
        sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx", precision="int8")
    assert (tmp_path / "a.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def changed(proto, value):
    (bias,) = (t for t in proto.graph.initializer if t.name == "head.bias")
    numbers = onnx.numpy_helper.to_array(bias).copy()
    numbers[0] += value
    bias.CopyFrom(onnx.numpy_helper.from_array(numbers, bias.name))
    return proto


def test_error_and_agreement_are_relative_to_the_outputs():
    """Logits of 100 and 50, of which the second rises by 1 or by 60."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([100.0, 50.0])
    images = torch.zeros(1, 3, 1, 1)
    for rise, error, same in ((0, 0.0, 8), (1, 0.01, 8), (60, 0.6, 0), (np.nan, np.inf, 0)):
        found = agreement.compared(
            model, b"", lambda x, rise=rise: [model(x) + torch.tensor([0, rise])], images, dynamic_batch=False
        )
        assert found.error == pytest.approx(error) and found.images == 8
        assert found.agreement == same or np.isnan(rise)
    with pytest.raises(ValueError, match="differ"):
        agreement.refuse_beyond(found, 0.1, "export")


@pytest.mark.parametrize("opset", [9, 17, 999])
def test_an_opset_that_cannot_be_written_is_refused(opset, tmp_path, refused):
    with refused(f"opset {opset}", "18 to"):
        sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_cannot_convert_to_is_refused(tmp_path, refused):
    newest = onnx.defs.onnx_opset_version()
    with refused(f"opset {newest}", "leave it out"):
        sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx", opset=newest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with refused(package, "sidt[onnx]"):
        sidt.export.to_onnx(sliced(VIT_TINY), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
    sidt.export.to_torch(sliced(VIT_TINY), tmp_path / "a.pt2")  # needs none of them


def test_where_no_file_can_be_is_said_before_the_work(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(exporting, "as_onnx", None)
    (tmp_path / "file").write_text("old")
    with refused("is a folder"):
        sidt.export.to_onnx(nn.Identity(), tmp_path)
    with refused(tmp_path / "file", "not a folder"):
        sidt.export.to_onnx(nn.Identity(), tmp_path / "file" / "a.onnx")
    monkeypatch.undo()
    with refused("float16", "fp16"):
        sidt.export.to_onnx(nn.Identity(), tmp_path / "a.onnx", precision="float16")


class Counts(nn.Module):
    def forward(self, images):
        return images.sum((1, 2, 3)) if float(images.sum()) > 0 else images


def test_a_model_that_is_no_graph_is_one_line(tmp_path, refused):
    for export in (sidt.export.to_onnx, sidt.export.to_torch):
        with refused("cannot export this Counts"):
            export(Counts(), tmp_path / "a", input_size=(3, 8, 8))
    assert not list(tmp_path.iterdir())
