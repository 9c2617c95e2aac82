"""A detector as a dimension space: its backbone's dimensions, and where they live in the neck.

A detector's space is its backbone's space with every name prefixed, the places where output maps enter the neck, and
all other parameters as places without a dimension. So scores, costs, plans and slices of a whole detector are the
same functions as those of a backbone. In MMSegmentation's segmentors, which often have no neck, the decode head and
the auxiliary heads read the maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from sidt.cost.complexity import NOT_COUNTED, Row, report, time_call
from sidt.detection.detectors.backbones import TimmBackbone, map_dimensions, searchable
from sidt.detection.detectors.channels import Cut, channels_outside
from sidt.detection.detectors.configs import channels_of, maps_of, readers
from sidt.detection.detectors.streams import detector_streams, readers_of_maps
from sidt.errors import InputError
from sidt.space.axes import Axis
from sidt.space.space import DimensionSpace, Place, space_for
from sidt.space.trace import InputSize, Trace, trace

BACKBONE = "backbone."
_PROPOSALS = 1000  # boxes that the second stage refines, and objects that it draws masks for, in one image:
_OBJECTS = 100  # MMDetection's own settings for COCO


def detector_space(detector: nn.Module, config: Any, input_size: InputSize, *, outside: bool = False) -> DimensionSpace:
    """The space of a detector, whose costs count the backbone alone; see :func:`whole`.

    Args:
        detector: built from ``config``.
        config: the model's part of an MMDetection config.
        input_size: channels, height, width of the image whose cost is counted.
        outside: whether the channels of neck and heads are dimensions too, where it is seen which they are
            (:mod:`sidt.detection.detectors.channels`).

    Raises:
        InputError: the backbone has no space, or does not take the size.
    """
    inside, module = searchable(detector.get_submodule("backbone"))
    prefix = BACKBONE + inside
    inner = space_for(module, input_size)
    maps = map_dimensions(detector.get_submodule("backbone"), inner)
    places = {f"{prefix}{name}": place for name, place in inner.places.items()}
    attributes = {f"{prefix}{path}": axis for path, axis in inner.attributes.items()}
    if isinstance(detector.backbone, TimmBackbone):
        places |= _norm_places(detector.backbone, maps)
    reading = readers(config)
    if any(channels_of(reader) is None for reader, _ in reading):
        reading = []
    fixed: set[str] = set() if reading else set(maps)
    for reader, path in reading:
        read, unknown = _reader_places(detector, reader, path, maps, inner.sizes)
        places |= read
        fixed |= unknown
        attributes |= _reader_attributes(detector, path, maps_of(reader, maps))
    shapes: dict[str, Tensor] = dict(detector.named_parameters())
    constant = {
        name: Place(tuple(((size,),) for size in tensor.shape), ".".join(name.split(".")[:2]), False)
        for name, tensor in shapes.items()
        if name not in places
    }
    order = {name: i for i, name in enumerate([*dict(detector.named_parameters()), *dict(detector.named_buffers())])}
    places = dict(sorted((places | constant).items(), key=lambda item: order[item[0]]))
    cost, axes_of = trace_detector(detector, input_size)[0], {name: place.axes for name, place in places.items()}
    read_by: dict[str, tuple[str, ...] | str] = dict.fromkeys(inner.streams, ())
    read_by |= readers_of_maps(detector, [path for _, path in reading], maps, input_size)
    read_by |= dict.fromkeys(fixed, "it is not known how its map is read")
    rotated = getattr(detector, "sidt_rotated", ())
    found = replace(
        inner,
        dimensions={
            n: replace(d, fixed=d.fixed or n in fixed, ordered=n in rotated) for n, d in inner.dimensions.items()
        },
        places=places,
        attributes=attributes,
        attention={heads: f"{prefix}{owner}" for heads, owner in inner.attention.items()},
        trace=cost,
        streams=detector_streams(detector, module, prefix, axes_of, cost, read_by),
        counted=BACKBONE,
    )
    return channels_outside(detector, input_size, _run_heads).within(found) if outside else found


def whole(space: DimensionSpace) -> DimensionSpace:
    """The same space, with costs that count the whole detector."""
    return replace(space, counted="")


def _norm_places(backbone: TimmBackbone, maps: Sequence[str]) -> dict[str, Place]:
    return {
        f"{BACKBONE}norms.{i}.{name}": Place((((maps[i],),),), f"{BACKBONE}norms.{i}", False)
        for i, norm in enumerate(backbone.norms)
        for name, _ in norm.named_parameters()
    }


def map_channels(detector: nn.Module, input_size: InputSize) -> tuple[Axis | None, ...]:
    """For each map that the neck gives, the channels of :func:`detector_space` that it has; ``None`` if it is whole."""
    return channels_outside(detector, input_size, _run_heads).maps


# --- what reads the maps -------------------------------------------------------------------------------------------


def _reader_places(
    detector: nn.Module, reader: Mapping[str, Any], path: str, maps: Sequence[str], sizes: Mapping[str, int]
) -> tuple[dict[str, Place], set[str]]:
    """Where the maps enter a neck or head; and the widths of which that cannot be told, which must stay whole.

    It is built again with one channel more in one map: tensors that grow by one along one axis read that map.
    """
    given, own_maps = channels_of(reader), maps_of(reader, maps)
    several = isinstance(given, list | tuple)
    channels = [sizes[name] for name in own_maps]
    if list(given if several else [given]) != channels:
        kind = path.partition(".")[0].replace("_", " ")
        raise InputError(
            f"the {kind} {reader['type']} has in_channels={given}, but the backbone's maps have {channels} channels; "
            f"set {path}.in_channels={channels if several else channels[0]}"
        )
    own = {name: tuple(p.shape) for name, p in detector.get_submodule(path).named_parameters()}
    places: dict[str, Place] = {}
    fixed: set[str] = set()
    for i, name in enumerate(own_maps):
        larger = [c + (j == i) for j, c in enumerate(given)] if several else given + 1
        try:
            with torch.device("meta"):
                probe: nn.Module = MODELS.build({**reader, "in_channels": larger})
        except Exception:  # say, channels in groups: the width of its maps cannot change by one
            fixed.add(name)
            continue
        for parameter, tensor in probe.named_parameters():
            before, after = own.get(parameter, ()), tuple(tensor.shape)
            if before == after:
                continue
            grown = [d for d, (b, a) in enumerate(zip(before, after, strict=False)) if a != b]
            if len(before) != len(after) or len(grown) != 1 or before[grown[0]] != sizes[name]:
                fixed.add(name)
                continue
            axes: list[Axis] = [((size,),) for size in before]
            axes[grown[0]] = ((name,),)
            places[f"{path}.{parameter}"] = Place(tuple(axes), f"{path}.{parameter.split('.')[0]}", False)
    return places, fixed


def _reader_attributes(detector: nn.Module, path: str, own_maps: Sequence[str]) -> dict[str, Axis]:
    own = getattr(detector.get_submodule(path), "in_channels", None)
    if isinstance(own, list):
        return {f"{path}.in_channels.{i}": ((name,),) for i, name in enumerate(own_maps)}
    return {f"{path}.in_channels": ((own_maps[0],),)} if isinstance(own, int) and len(own_maps) == 1 else {}


# --- costs ---------------------------------------------------------------------------------------------------------


def trace_detector(detector: nn.Module, input_size: InputSize) -> tuple[Trace, tuple[str, ...]]:
    """Trace one image through backbone, neck and heads; also the heads whose multiply-adds could not be counted.

    Dense heads see the neck's maps. The second stage sees as many boxes as MMDetection's COCO settings keep: 1,000
    proposals, and 100 objects for masks; cutting regions out is not counted.
    """
    missed: list[str] = []

    def forward(model: Any, image: Tensor) -> None:
        missed.extend(_run_heads(model, image, model.extract_feat(image))[0])

    found = trace(detector, input_size, forward)
    return found, tuple(dict.fromkeys(missed))


def _run_heads(model: Any, image: Tensor, maps: Any, cut: Cut = lambda *_: None) -> tuple[list[str], list[Any]]:
    """Run all heads on the maps of an image: the names of those that cannot be, and what the others give."""
    missed: list[str] = []
    given: list[Any] = []
    for name in ("rpn_head", "bbox_head", "mask_head", "decode_head", "auxiliary_head"):
        for head in _list(getattr(model, name, None)):
            _try(missed, given, name, head, maps)
    roi_head = getattr(model, "roi_head", None)
    if roi_head is not None:
        for name, boxes, extractor in (
            ("bbox_head", _PROPOSALS, "bbox_roi_extractor"),
            ("mask_head", _OBJECTS, "mask_roi_extractor"),
        ):
            heads, cutters = _list(getattr(roi_head, name, None)), _list(getattr(roi_head, extractor, None))
            for i, head in enumerate(heads):
                cutter = cutters[min(i, len(cutters) - 1)] if cutters else roi_head.bbox_roi_extractor
                size = cutter.roi_layers[0].output_size
                regions = image.new_empty(boxes, cutter.out_channels, *size)
                path = next(path for path, module in model.named_modules() if module is cutter)
                cut(regions, maps[: len(cutter.roi_layers)], path)
                _try(missed, given, f"roi_head.{name}", head, regions)
    return missed, given


def _list(module: Any) -> list[Any]:
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _try(missed: list[str], given: list[Any], name: str, head: nn.Module, maps: Any) -> None:
    try:
        given.append(head(maps))
    except Exception:  # a head that needs more than maps, such as DETR's: its name is in the report
        missed.append(name)


def parts(space: DimensionSpace, sizes: Mapping[str, int] | None = None) -> dict[str, Row]:
    """Parameters and multiply-adds of a plan for the backbone, the neck and each head, in the detector's order."""
    rows: dict[str, Row] = {}
    for row in report(whole(space), sizes, "module").rows:
        head, *rest = row.name.split(".")
        name = f"roi_head.{rest[0]}" if head == "roi_head" and rest else head
        before = rows.get(name, Row(name, 0, 0))
        rows[name] = Row(name, before.params + row.params, before.macs + row.macs)
    return rows


def not_counted(detector: nn.Module, space: DimensionSpace) -> str:
    """What the multiply-adds of :func:`parts` leave out, and what they take the second stage to see."""
    unused = [name for name, row in parts(space).items() if row.params and not row.macs]  # say, DETR's encoder
    missed = list(dict.fromkeys([*unused, *trace_detector(detector, space.trace.input_size)[1]]))
    if hasattr(detector, "roi_head"):
        missed.append(f"cutting regions (second stage: {_PROPOSALS} boxes, {_OBJECTS} masks)")
    return ", ".join([*missed, NOT_COUNTED])


def predict(detector: nn.Module, image: Tensor) -> Any:
    """The boxes of a batch of one image."""
    shape = tuple(image.shape[2:])
    sample = DetDataSample(
        metainfo={"img_shape": shape, "ori_shape": shape, "batch_input_shape": shape, "scale_factor": (1.0, 1.0)}
    )
    return detector(image, [sample], mode="predict")


def run_backbone(detector: Any, image: Tensor) -> Any:
    """The maps of a batch of images."""
    return detector.backbone(image)


def time_detector(detector: nn.Module, input_size: InputSize, *, seconds: float = 1.0) -> float:
    """Median milliseconds from one image of a size to its boxes, on the detector's device (torch's timer)."""
    parameter = next(detector.parameters())
    image = torch.randn(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    return time_call(detector, lambda model: predict(model, image), seconds=seconds)
