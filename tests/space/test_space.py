"""Binding a file to a model, and what is said about a file or a model that does not fit."""

import pytest
import timm
from backbones import MMDET_PVT, SWIN, TIMM_BACKBONES, VIT_TINY, dense
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sidt.space.finding import families
from sidt.space.plan import DimensionPlan
from sidt.space.space import space_for
from sidt.space.trace import input_size_of
from sidt.surgery.slicing import slice_model

GOOD = f"""
models: [{__name__}.Net]
axes: {{hidden: mlp}}
parameters:
  fc1.weight: hidden, _
  fc1.bias: hidden
  fc2.weight: _, hidden
  fc2.bias: _
"""


class Net(nn.Module):
    """A user's own model: an MLP on a 3 x 2 x 2 image."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, hidden), nn.Linear(hidden, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)).relu())


@pytest.fixture
def described(tmp_path):
    """``described(text)`` is the space of Net by a file of its own; pairs of words replace parts of GOOD."""

    def describe(text: str = GOOD, *, model: nn.Module | None = None, size=(3, 2, 2), **replaced: str):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return space_for(model or Net(), size, file=file)

    return describe


def test_dimensions_of_a_vit():
    _, space = dense(VIT_TINY)
    names = ["embed", *(f"{n}.{i}" for i in range(2) for n in ("heads", "qk", "v", "hidden"))]
    assert list(space.dimensions) == names
    assert space.sizes == {"embed": 192} | {
        f"{n}.{i}": s for i in range(2) for n, s in {"heads": 3, "qk": 64, "v": 64, "hidden": 768}.items()
    }
    assert (space.model, space.family) == ("VisionTransformer", "vit")
    assert space.per == {f"{n}.{i}": f"heads.{i}" for i in range(2) for n in ("qk", "v")}
    assert space.attention == {"heads.0": "blocks.0.attn", "heads.1": "blocks.1.attn"}
    assert space.blocks() == [(0,), (1,)]
    assert {d.kind for d in space.dimensions.values()} == {"width", "heads", "qk", "v", "mlp"}
    assert not any(d.fixed for d in space.dimensions.values())


def test_dimensions_of_a_swin():
    _, space = dense(SWIN)
    assert [space.sizes[f"embed.{s}"] for s in range(4)] == [48, 96, 192, 384]
    assert space.blocks() == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert space.places["layers.1.downsample.reduction.weight"].axes == ((("embed.1",),), ((4, "embed.0"),))
    assert space.places["norm.weight"].axes == ((("embed.3",),),)
    assert space.places["layers.1.blocks.0.norm1.weight"].block == "layers.1.blocks.0"
    assert space.places["head.fc.weight"].block == "head"


def test_what_the_first_stage_reads_is_not_searched():
    _, space = dense(MMDET_PVT)
    first, second = (space.places[f"layers.{stage}.0.projection.weight"].axes[:2] for stage in (0, 1))
    assert first == ((("embed.0",),), ((3,),)) and second == ((("embed.1",),), (("embed.0",),))
    assert [n for n in space.dimensions if n.startswith("embed")] == [f"embed.{stage}" for stage in range(4)]


@pytest.mark.parametrize(("name", "read", "written"), [("mvitv2_tiny", 0, 0), ("mvitv2_large", 1, 1)])
def test_a_module_that_is_there_says_which_width_a_block_has(name, read, written):
    """A width is projected by the next stage's first block, or by a stage's last one; the first has none before it."""
    _, space = dense(next(b for b in TIMM_BACKBONES if b.name == name))
    axes = {parameter: place.axes for parameter, place in space.places.items()}
    assert axes["stages.0.blocks.0.norm1.weight"] == ((("embed.0",),),)
    assert axes["stages.1.blocks.0.attn.qkv.weight"][1] == ((f"embed.{read}",),)
    assert axes["stages.1.blocks.1.norm1.weight"] == ((("embed.1",),),)
    assert axes["stages.0.blocks.0.mlp.fc2.bias"] == (((f"embed.{written}",),),)
    assert space.attributes["feature_info.0.num_chs"] == ((f"embed.{written}",),)


def test_what_norms_take_statistics_over():
    model = timm.create_model("beit3_base_patch16_224", depth=1, embed_dim=48, num_heads=4)
    space = space_for(model)
    assert {name for name, d in space.dimensions.items() if d.normed} == {"heads.0", "v.0", "hidden.0"}
    assert not any(d.fixed for d in space.dimensions.values())
    qk_norm = timm.create_model("vit_tiny_patch16_224", depth=1, qk_norm=True)
    assert {name for name, d in space_for(qk_norm).dimensions.items() if d.fixed} == {"qk.0"}


def test_subclasses_have_the_space_of_their_family():
    class Mine(VisionTransformer):
        pass

    assert space_for(Mine(depth=1, embed_dim=48, num_heads=4)).family == "vit"


def test_families():
    assert {family.file.stem for family in families()} >= {
        "vit",
        "swin",
        "swin_v2",
        "pvt_v2",
        "mmdet_swin",
        "mmdet_pvt",
    }


def test_a_users_own_file(described):
    space = described()
    assert space.sizes == {"hidden": 5} and space.family == "mine" and space.model == "Net"


def test_a_model_without_a_space(refused):
    with refused("resnet.ResNet", "--draft FILE", "CONTRIBUTING.md", "SIDT_SPACES"):
        space_for(timm.create_model("resnet18"))


def test_a_parameter_without_axes(refused, described):
    model = Net()
    model.extra = nn.Linear(2, 3)
    with refused("Net", "extra.weight", "mine.yaml"):
        described(model=model)
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    vit.blocks[0].attn.extra = nn.Linear(2, 3)
    with refused("VisionTransformer", "blocks.0.attn.extra", "vit.yaml"):
        space_for(vit)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fc1.bias:", "fc{i}.bias: _\n  fc1.bias:", ["fc1.bias", "2 lines", "fc{i}.bias"]),
        ("hidden, _", "hidden, hidden", ["fc1.weight", "[5, 12]", "'hidden, hidden'", "hidden="]),
        ("fc2.weight: _, hidden", "fc2.weight: _, 2 hidden", ["fc2.weight", "[4, 5]", "hidden=5"]),
        ("fc1.bias: hidden", "fc1.bias: hiden", ["fc1.bias", "'hiden'", "not declared"]),
        ("fc1.bias: hidden", "fc1.bias: hidden, _", ["fc1.bias", "1 axes", "2"]),
        ("fc1.bias: hidden", "fc1.bias: hidden.{0}", ["fc1.bias", "'hidden'", "1 indices", "not 0"]),
        ("fc1.bias: hidden", "fc1.bias: hidden +", ["'hidden +'"]),
        ("{hidden: mlp}", "{hidden: mlps}", ["hidden", "'mlps'", "width, heads, qk, v, mlp"]),
        ("{hidden: mlp}", "{hidden: qk per}", ["hidden", "'qk per'"]),
        ("{hidden: mlp}", "{hidden: qk per heads}", ["hidden", "heads"]),
        ("{hidden: mlp}", "[hidden]", ["mine.yaml", "axes"]),
        ("{hidden: mlp}", "", ["mine.yaml", "axes"]),
        (f"models: [{__name__}.Net]", "models: somewhere.Net", ["mine.yaml", "models"]),
        (f"models: [{__name__}.Net]", "", ["mine.yaml", "models"]),
        (f"models: [{__name__}.Net]", f"model: [{__name__}.Net]", ["mine.yaml", "models"]),
        (
            f"models: [{__name__}.Net]",
            f"models: [{__name__}.Net]\nforwards: [mine]",
            ["forwards", "['mine']", "a module"],
        ),
        ("{hidden: mlp}", "{hidden: mlp", ["mine.yaml", "not YAML"]),
    ],
)
def test_a_file_that_does_not_fit(old, new, words, refused, described):
    assert old in GOOD
    with refused(*words):
        described(GOOD.replace(old, new))


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "models: []\naxes: {}\nparameters: []"])
def test_a_file_of_another_shape(text, refused, described):
    with refused("mine.yaml"):
        described(text)


def test_a_missing_file(refused, tmp_path):
    with refused("nowhere.yaml", "No such file"):
        space_for(Net(), (3, 2, 2), file=tmp_path / "nowhere.yaml")


def test_alternatives_of_which_none_or_both_fit(refused, described):
    with refused("fc2.weight", "[4, 5]"):
        described(GOOD.replace("_, hidden", "_, hidden + hidden | _, 2 hidden"))
    with refused("fc2.weight", "[4, 5]"):
        described(GOOD.replace("_, hidden", "_, hidden | hidden, hidden | 4, hidden"))


def test_alternatives_in_order(described):
    """The first that fits, and one of a dimension that the model does not have does not."""
    axes = GOOD.replace("{hidden: mlp}", "{hidden: mlp, wide: width}")
    assert described(axes.replace("_, hidden", "_, wide || _, hidden")).places["fc2.weight"].axes[1] == (("hidden",),)
    both = axes.replace("fc1.bias: hidden", "fc1.bias: wide").replace("_, hidden", "_, wide || _, hidden")
    space = described(both + "attributes: {fc2.in_features: wide || hidden}")
    assert space.places["fc2.weight"].axes[1] == (("wide",),) == space.attributes["fc2.in_features"]


def test_units_chosen_per_head_need_their_head(refused, described):
    axes = "{heads: heads, unit: v per heads}"
    per = GOOD.replace("{hidden: mlp}", axes).replace("hidden", "heads unit") + "attributes: {fc1.heads: heads}"
    model = Net(hidden=6)
    model.fc1.heads = 2
    with refused("fc1.bias", "unit", "heads", "unit!"):
        described(per.replace("bias: heads unit", "bias: unit heads"), model=model)
    with refused("fc1.bias", "unit", "heads"):  # whole, it would be permuted without a word
        described(per.replace("bias: heads unit", "bias: unit! heads!"), model=model)
    with refused("mine.yaml", "heads needs one axis of kind qk", "it has v"):
        described(per, model=model)


def test_image_sizes(refused, described):
    model, _ = dense(VIT_TINY)
    assert input_size_of(model) == (3, 64, 64)
    assert input_size_of(timm.create_model("vit_tiny_patch16_224", depth=1, in_chans=1)) == (1, 224, 224)
    with refused("VisionTransformer", "3x32x32"):
        space_for(model, (3, 32, 32))
    with refused("VisionTransformer", "1x64x64"):
        space_for(model, (1, 64, 64))
    with refused("Net", "image size", "input_size="):
        described(size=None)
    with refused("Net", "3x4x4"):
        described(size=(3, 4, 4))


def test_describing_a_model_leaves_it_alone():
    model = VIT_TINY.build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    space_for(model)
    assert model.training and all((model.state_dict()[n] == t).all() for n, t in before.items())
    assert next(model.parameters()).device.type == "cpu"


def test_slicing_with_a_users_own_file(described):
    space = described()
    model = Net()
    sliced = slice_model(model, DimensionPlan(space, {"hidden": [4, 1]}))
    assert (sliced.fc1.out_features, sliced.fc2.in_features) == (2, 2)
    assert (sliced.fc1.weight == model.fc1.weight[[1, 4]]).all() and (
        sliced.fc2.weight == model.fc2.weight[:, [1, 4]]
    ).all()


def test_what_is_whole_needs_no_line(described, refused):
    text = GOOD.replace("  fc2.weight: _, hidden\n  fc2.bias: _\n", "whole: [fc2]\n")
    space = described(text)
    assert space.places["fc2.weight"].axes == (((4,),), ((5,),)) and space.places["fc2.weight"].block == "fc2"
    with refused("fc2.weight", "has no axes"):  # a module is named, and not how a name begins
        described(text.replace("[fc2]", "[fc]"))


def test_stages_of_a_flat_list(refused, described):
    (hiera,) = (b for b in TIMM_BACKBONES if b.name == "hiera_tiny_224")
    _, space = dense(hiera)
    widths = {n: space.places[f"blocks.{n}.attn.qkv.weight"].axes[1] for n in range(5)}
    assert widths == {
        0: (("embed.0",),),
        1: (("embed.0",),),
        2: (("embed.1",),),
        3: (("embed.1",),),
        4: (("embed.2",),),
    }
    assert space.places["head.norm.weight"].axes == ((("embed.3",),),)
    assert space.attributes["feature_info.2.num_chs"] == (("embed.2",),)
    with refused("mine.yaml", "stages", "one index"):
        described(GOOD + "stages: {s: fc1.weight}\n")
