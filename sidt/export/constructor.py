"""Sliced models that timm builds by itself: where all sizes are ones that its constructors take.

timm's constructors take one number of heads, one head size and one hidden size for all blocks (of a stage), and most a
width that is as wide as its heads together; ``allocate(..., uniform=True)`` makes such plans. Such a model is a dense
timm model of other arguments, and is written as one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidt.errors import InputError
from sidt.export.checkpoint import as_json, write
from sidt.export.comparison import difference_of_outputs
from sidt.export.models import create_model, hub_config, name_of, own_args
from sidt.export.weights import difference_of
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, space_for


def to_timm(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Write a model as one of timm's own, for ``timm.create_model(name, **args)`` and safetensors alone.

    The folder is a checkpoint for :func:`sidt.load` and ``sidt push`` too, and one that timm reads by itself:
    ``timm.create_model("local-dir:FOLDER", pretrained=True)``, or ``"hf-hub:OWNER/NAME"`` once it is there.

    Args:
        model: a timm model, dense or sliced.
        folder: where to write; made if needed.

    Returns:
        ``architecture`` and ``model_args``: what ``timm.create_model`` takes. They are in ``config.json`` too.

    Raises:
        InputError: a size is none that timm's constructor takes; the message names the first.
    """
    plan: DimensionPlan | None = getattr(model, "sidt_plan", None)
    space = space_for(model) if plan is None else plan.space
    name = name_of(model)
    if name is None:
        raise InputError(f"this {type(model).__name__} is no model of timm's")
    args = own_args(model)
    if plan is not None and plan.sizes != space.sizes:
        sizes_of = None if space.own is not None else _CONSTRUCTORS.get(space.family)
        if sizes_of is None:
            known = ", ".join(_CONSTRUCTORS)
            raise InputError(f"what timm's {space.model} takes is not known here; it is of {known}; sidt.save keeps it")
        args |= sizes_of(space, plan.sizes)
    rebuilt = create_model(name, as_json(args)).eval()
    if space.own is not None:
        rebuilt.sidt_family = space.own  # type: ignore[assignment]
    reference = next(model.parameters())
    rebuilt.to(reference.device, reference.dtype)
    state = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    if plan is not None:
        _move_scales(model, plan, state)
    difference = difference_of(rebuilt, state)
    if difference is None:
        rebuilt.load_state_dict(state, strict=True)
        difference = difference_of_outputs(model, rebuilt)
    if difference:
        raise InputError(f"timm.create_model({name!r}, **{args}) builds another model: {difference}; use sidt.save")
    config = hub_config(rebuilt)
    own = {"model": name, "args": config.get("model_args", {})}  # for sidt.load, beside timm's
    write(Path(folder), {**config, **own}, DimensionPlan(space_for(rebuilt), {}), state)
    return {"architecture": config["architecture"], "model_args": own["args"]}


def _move_scales(model: nn.Module, plan: DimensionPlan, state: dict[str, Tensor]) -> None:
    """Put the scales of the dense model's attentions, where q and k were cut, into the rows of q of a state dict."""
    for heads, path in plan.space.attention.items():
        attention: Any = model.get_submodule(path)
        qk = next(d for d in plan.space.dimensions.values() if d.per == heads and d.kind == "qk")
        size = plan.sizes[qk.name]
        if size == qk.size:
            continue
        layer, factor = ("q" if hasattr(attention, "q") else "qkv"), attention.scale * size**0.5
        for leaf in ("weight", "bias"):
            if (key := f"{path}.{layer}.{leaf}") in state:
                state[key][: plan.sizes[heads] * size] *= factor


# --- what constructors take ---------------------------------------------------------------------------------------


def _one(space: DimensionSpace, sizes: Mapping[str, int], kind: str, stage: tuple[int, ...]) -> int:
    """The size of a kind in all blocks of a stage."""
    own = [d.name for d in space.dimensions.values() if d.kind == kind and d.index[: len(stage)] == stage]
    for name in own:
        if sizes[name] != sizes[own[0]]:
            raise _not_taken(f"{name} is {sizes[name]} and {own[0]} is {sizes[own[0]]}")
        if not sizes[name]:
            raise _not_taken(f"{name} is 0")
    return sizes[own[0]]


def _not_taken(what: str) -> InputError:
    return InputError(
        f"timm's constructor does not take these sizes: {what}; allocate with uniform=True (search.uniform in a "
        f"config), or use sidt.save"
    )


def _attention(
    space: DimensionSpace, sizes: Mapping[str, int], stage: tuple[int, ...], width: str | None
) -> tuple[int, int]:
    """Heads and their size; with a width, which they must be as wide as together."""
    heads, qk, v = (_one(space, sizes, kind, stage) for kind in ("heads", "qk", "v"))
    where = ".".join(map(str, (*stage, 0)))
    if qk != v:
        raise _not_taken(f"qk.{where} is {qk} and v.{where} is {v}")
    if width is not None and heads * v != sizes[width]:
        raise _not_taken(f"{width} is {sizes[width]}, and {heads} heads of {v} are {heads * v}")
    return heads, v


def _ratio(hidden: int, width: int) -> float:
    """The MLP ratio of which ``int(width * ratio)`` is the hidden size."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _vit(space: DimensionSpace, sizes: Mapping[str, int]) -> dict[str, Any]:
    heads, _ = _attention(space, sizes, (), "embed")
    ratio = _ratio(_one(space, sizes, "mlp", ()), sizes["embed"])
    return {"embed_dim": sizes["embed"], "num_heads": heads, "mlp_ratio": ratio}


def _stages(space: DimensionSpace) -> list[int]:
    return sorted({d.index[0] for d in space.dimensions.values() if d.kind == "heads"})


def _swin(space: DimensionSpace, sizes: Mapping[str, int]) -> dict[str, Any]:
    stages, first = _stages(space), sizes["embed.0"]
    for s in stages:
        if sizes[f"embed.{s}"] != first * 2**s:
            raise _not_taken(f"embed.{s} is {sizes[f'embed.{s}']}, and {2**s} times embed.0 is {first * 2**s}")
    attentions = [_attention(space, sizes, (s,), None) for s in stages]
    ratios = [_ratio(_one(space, sizes, "mlp", (s,)), sizes[f"embed.{s}"]) for s in stages]
    heads, dims = ([a[i] for a in attentions] for i in (0, 1))
    return {"embed_dim": first, "num_heads": heads, "head_dim": dims, "mlp_ratio": ratios}


def _pvt_v2(space: DimensionSpace, sizes: Mapping[str, int]) -> dict[str, Any]:
    stages = _stages(space)
    heads = [_attention(space, sizes, (s,), f"embed.{s}")[0] for s in stages]
    widths = [sizes[f"embed.{s}"] for s in stages]
    ratios = [_ratio(_one(space, sizes, "mlp", (s,)), width) for s, width in zip(stages, widths, strict=True)]
    return {"embed_dims": widths, "num_heads": heads, "mlp_ratios": ratios}


# By the name of the search space.
_CONSTRUCTORS: dict[str, Callable[[DimensionSpace, Mapping[str, int]], dict[str, Any]]] = {
    "vit": _vit,
    "swin": _swin,
    "pvt_v2": _pvt_v2,
}
