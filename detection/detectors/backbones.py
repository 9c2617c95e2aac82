"""timm's backbones in MMDetection, and backbones that a plan has made smaller."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT  # whose names every package's configs find, MMSegmentation's too
from timm.layers.helpers import to_2tuple
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from sidt.detection.detectors.configs import without_weights
from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.export.models import create_model
from sidt.export.weights import load_weights
from sidt.files import read_json
from sidt.space.plan import DimensionPlan, load_plan
from sidt.space.space import DimensionSpace, space_for
from sidt.space.trace import meta_copy
from sidt.surgery.slicing import slice_model

_KNOWN = "use a ViT, Swin, Swin V2 or PVT v2"


@ROOT.register_module()
class TimmBackbone(BaseModule):
    """A timm model without its classifier, as the backbone of a detector.

    Images of any size go in, padded to whole patches; they must come normalised as the model expects (the ``mean``
    and ``std`` of its timm config). A plain ViT gives the map of its last block after its final norm. A model of
    stages gives one map for each stage; where the stages have no norm of their own (Swin), each map gets one, and
    the last starts as the model's final norm. No parameter is left that the maps do not need.

    The weights are the model's from the start: MMEngine's ``init_weights`` does not touch them.

    Args:
        model: a timm model name, or a folder that :func:`sidt.save` or ``sidt run`` wrote, dense or sliced, whose
            weights are then loaded. For a plan made on the detector, that sliced model is the dense one.
        args: further arguments for ``timm.create_model``, such as ``drop_path_rate``. For a folder they are added to
            its own. Swin shifts no windows in a stage that ``img_size`` makes as small as its window; give the
            detector's ``img_size``, or ``always_partition=True``, to shift them in every stage.
        pretrained: whether to take timm's published weights.
        checkpoint: a state dict for the whole timm model, with its classifier if it has one: give the classifier's
            ``num_classes`` in ``args`` (0 if there is none); it is dropped after loading.
        out_indices: the blocks or stages whose maps are wanted, in ascending order; negative ones count from the end.
            What comes after the last of them is dropped. Default: the last block, or every stage.

    Attributes:
        model: the timm model; the dimension space is this module's.
        norms: what is applied to each map, LayerNorm or nothing.
        out_indices: the blocks or stages of the maps, counted from 0.

    Raises:
        InputError: timm has no such model, it does not take images of any size, the folder or checkpoint does not
            fit, or an index is out of range.
    """

    model: Any
    norms: nn.ModuleList

    def __init__(
        self,
        model: str,
        args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        """Build the timm model, load its weights and drop what no map needs."""
        super().__init__()
        timm_model = _weighted(model, dict(args or {}), pretrained, checkpoint)
        reductions = [info["reduction"] for info in timm_model.feature_info]
        # Blocks of one stride share a width and a final norm, stages have their own.
        self.is_plain = len(set(reductions)) == 1
        self.out_indices = _resolved(out_indices, len(reductions), self.is_plain)
        final = getattr(timm_model, "norm", getattr(timm_model, "norm_pre", None))  # DaViT's stands before its head
        if self.is_plain and isinstance(final, nn.Identity) and hasattr(timm_model, "fc_norm"):
            timm_model.norm = timm_model.fc_norm  # with average pooling it stands behind the pool
        timm_model.prune_intermediate_layers(list(self.out_indices), prune_norm=not self.is_plain, prune_head=True)
        self.model = timm_model
        self.norms = nn.ModuleList(nn.Identity() for _ in self.out_indices)
        if not self.is_plain and isinstance(final, nn.LayerNorm):
            self.norms = nn.ModuleList(LayerNorm2d(channels, eps=final.eps) for channels in self.out_channels)
            if self.out_indices[-1] == len(reductions) - 1:
                self.norms[-1].load_state_dict(final.state_dict())
        _check_maps(self)
        self.is_init = True

    @property
    def out_channels(self) -> tuple[int, ...]:
        """The channels of each map, after slicing too."""
        return tuple(self.model.feature_info[index]["num_chs"] for index in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image from one position of each map to the next."""
        return tuple(self.model.feature_info[index]["reduction"] for index in self.out_indices)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> for each output [B, channels, H / stride, W / stride], where parts of a position count."""
        height, width = images.shape[-2:]
        tall, wide = _whole(self.model, images.shape[1])
        images = F.pad(images, (0, -width % wide, 0, -height % tall))
        maps = self.model.forward_intermediates(
            images, indices=list(self.out_indices), norm=self.is_plain, output_fmt="NCHW", intermediates_only=True
        )
        if tall > self.strides[0]:  # what is padded for the whole is no part of the first maps
            sides = ((-(-height // stride), -(-width // stride)) for stride in self.strides)
            maps = [features[..., :h, :w] for features, (h, w) in zip(maps, sides, strict=True)]
        return tuple(norm(features) for norm, features in zip(self.norms, maps, strict=True))


def _whole(model: Any, channels: int) -> tuple[int, int]:
    """Pixels that the sides of an image must be multiples of, which only that module knows that embeds its patches."""
    embed = getattr(getattr(getattr(model, "encoder", model), "patch_embed", None), "proj", None)
    if not isinstance(embed, nn.Conv2d):
        return 1, 1
    height, width = embed.stride
    if (window := getattr(model, "pos_embed_window", None)) is not None:  # SAM 2's Hiera lays tiles of positions
        last = model.feature_info[-1]["reduction"]  # and pools pairs
        return math.lcm(height * window.shape[-2], last), math.lcm(width * window.shape[-1], last)
    # Other convolutions have padding of their own, or read a stem's maps.
    own = embed.kernel_size == embed.stride and embed.in_channels == channels
    return (height, width) if own else (1, 1)


def _check_maps(backbone: TimmBackbone) -> None:
    """Try an image of an odd size, without computing anything."""
    size = (97, 130)
    name = type(backbone.model).__name__
    image = torch.empty(1, getattr(backbone.model, "in_chans", 3), *size, device="meta")
    try:
        maps = meta_copy(backbone)(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"timm's {name} does not take images of any size: {reason}; {_KNOWN}") from None
    for features, channels, stride in zip(maps, backbone.out_channels, backbone.strides, strict=True):
        seen = tuple(features.shape[1:])
        if seen[0] != channels or any(abs(n - side / stride) >= 1 for n, side in zip(seen[1:], size, strict=True)):
            raise InputError(
                f"timm's {name} gives a map of {seen} for an image of {size}, but states {channels} channels and "
                f"stride {stride}; {_KNOWN}"
            )
    # Not every model resizes its table of relative positions, and without data no index is out of range.
    tables = (p for key, p in backbone.model.named_parameters() if key.endswith("rel_pos_h"))
    if (table := next(tables, None)) is not None:
        side = (len(table) + 1) // 2 * backbone.strides[0] + backbone.strides[-1]
        try:
            with torch.no_grad():
                copy.deepcopy(backbone).eval()(torch.zeros(1, *image.shape[1:2], side, side))
        except IndexError as error:
            raise InputError(f"timm's {name} does not take images of any size: {error}; {_KNOWN}") from None


def _resolved(out_indices: Sequence[int] | None, count: int, is_plain: bool) -> tuple[int, ...]:
    """The wanted maps counted from 0."""
    if out_indices is None:
        return (count - 1,) if is_plain else tuple(range(count))
    indices = tuple(index + count if index < 0 else index for index in out_indices)
    if not indices or indices != tuple(sorted(set(indices))) or not 0 <= indices[0] <= indices[-1] < count:
        raise InputError(
            f"out_indices={list(out_indices)} must be distinct, in ascending order and from 0 to {count - 1}: "
            f"this model has {count} {'blocks' if is_plain else 'stages'}"
        )
    return indices


def _weighted(model: str, args: Mapping[str, Any], pretrained: bool, checkpoint: str | None) -> Any:
    """The whole timm model, with classifier and weights."""
    if not Path(model).is_dir():
        if "/" in model.removeprefix("timm/") and ":" not in model:
            raise InputError(f"there is no folder {model}; give a folder that `sidt run` wrote, or a timm model name")
        if pretrained and checkpoint is not None:
            raise InputError(f"{model}: give either pretrained=True or checkpoint={checkpoint!r}, not both")
        made = _any_size(model, args, pretrained=pretrained)
        if checkpoint is not None:
            load_weights(made, checkpoint)
        return made
    if pretrained or checkpoint is not None:
        raise InputError(f"the folder {model} brings its own weights; drop pretrained and checkpoint")
    saved = load(model)  # checks the whole folder
    config = read_json(Path(model) / "config.json")
    made = _any_size(config["model"], config["args"] | args)
    if (family := getattr(saved, "sidt_family", None)) is not None:
        made.sidt_family = family
    plan: DimensionPlan | None = getattr(saved, "sidt_plan", None)
    if plan is not None:
        made = slice_model(made, plan)
        del made.sidt_plan  # the detector's plans start from here
    load_weights(made, Path(model) / "model.safetensors")
    return made


def _any_size(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> Any:
    """``timm.create_model`` for images of any size."""
    with torch.device("meta"):  # timm does not tell a model's class before it is built
        kind = type(create_model(name, args))
    if not (hasattr(kind, "forward_intermediates") and hasattr(kind, "prune_intermediate_layers")):
        raise InputError(f"timm's {kind.__name__} ({name}) gives no maps: it has no forward_intermediates; {_KNOWN}")
    # Position embeddings are resized and window masks are made for every image; PVT v2 has neither.
    if any("dynamic_img_size" in inspect.signature(c).parameters for c in kind.__mro__[:-1]):
        args = {"dynamic_img_size": True, **args}
    return create_model(name, args, pretrained=pretrained)


def searchable(backbone: nn.Module) -> tuple[str, nn.Module]:
    """The module of a backbone that has the dimension space, and the prefix of its names inside the backbone."""
    return ("model.", backbone.model) if isinstance(backbone, TimmBackbone) else ("", backbone)


def map_dimensions(backbone: nn.Module, space: DimensionSpace) -> tuple[str, ...]:
    """For each map of a backbone, the width dimension that its channels are.

    Args:
        backbone: a TimmBackbone, MMDetection's own Swin or PVT, or the ViT of its project ViTDet, which has one map.
        space: the space of its searchable module.
    """
    indices: Sequence[int] = getattr(backbone, "out_indices", (0,))
    if getattr(backbone, "is_plain", False):  # XCiT's others are of the convolutions that make its patches
        return ([name for name in space.dimensions if name.partition(".")[0] == "embed"][-1],) * len(indices)
    return tuple("embed" if "embed" in space.dimensions else f"embed.{i}" for i in indices)


def slice_backbone(backbone: nn.Module, plan: DimensionPlan) -> nn.Module:
    """A smaller backbone that has only the units of the plan, with their weights. The given one is not changed.

    Raises:
        InputError: the plan is for another backbone.
    """
    sliced: Any
    if isinstance(backbone, TimmBackbone):
        sliced = copy.deepcopy(backbone)
        sliced.model = slice_model(backbone.model, plan)
        for norm, name in zip(sliced.norms, map_dimensions(backbone, plan.space), strict=True):
            if isinstance(norm, nn.LayerNorm):
                _keep_channels(norm, torch.from_numpy(plan.keep[name]))
    else:
        sliced = slice_model(backbone, plan)
    sliced.is_init = True  # its weights mean something: MMEngine must not draw new ones
    return sliced


def _keep_channels(norm: nn.LayerNorm, kept: Tensor) -> None:
    for name, tensor in list(norm.named_parameters()):
        taken = tensor.detach().index_select(0, kept.to(tensor.device))
        setattr(norm, name, nn.Parameter(taken, requires_grad=tensor.requires_grad))
    norm.normalized_shape = (len(kept),)


@ROOT.register_module(name="SlicedBackbone")
def sliced_backbone(dense: Mapping[str, Any], plan: str, space: str | None = None) -> nn.Module:
    """The architecture that a plan leaves of a backbone, for a detector's config: its checkpoint brings the weights.

    Args:
        dense: the config of the dense backbone. Where its weights would come from (``init_cfg``, ``pretrained``,
            ``checkpoint``) is ignored.
        plan: path of the plan for the backbone's searchable module.
        space: path of its search space, where that does not come with SiDT.

    Returns:
        The sliced backbone itself, of the class that ``dense`` names.

    Raises:
        InputError: the plan is missing, damaged, or for another backbone.
    """
    backbone = MODELS.build(without_weights(dense))
    prefix, module = searchable(backbone)
    # MMDetection's own backbones do not say their image size; any would do, as the cost is not asked for, if they
    # had no position embeddings.
    channels = dense.get("in_channels", dense.get("in_chans", 3))  # Swin's and PVT's, or ViTDet's
    own = (channels, *to_2tuple(dense.get("pretrain_img_size", 224)))
    kept = load_plan(plan, space_for(module, None if prefix else own, file=space), part=True)
    if not all(kept.sizes.values()) and not backbone.is_init:
        backbone.init_weights()  # before, as MMDetection's PVT divides by the channels of each convolution
        return slice_backbone(backbone, kept)
    sliced: Any = slice_backbone(backbone, kept)
    sliced.is_init = backbone.is_init  # as the dense backbone: without a checkpoint it starts as that would
    return sliced
