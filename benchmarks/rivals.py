"""Torch-Pruning and ModelOpt's FastNAS on current timm, each at its best.

A rival is measured by our counters, picks its own settings on held-out images, and hands back a plain timm model.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import Method, RivalError, Setting, cached
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.utils.data import Dataset

from sidt.files import read_json, replacing, write_json
from sidt.importance.criteria import cross_entropy
from sidt.training.batches import make_loader, rechunk
from sidt.training.evaluation import top1


def accuracy(model: nn.Module, images: Dataset[Any]) -> float:
    """Top-1 for choosing between candidates: in bfloat16, which is faster."""
    with torch.autocast("cpu", torch.bfloat16):
        return top1(model, images, device="cpu")


# --- models of other sizes, without a pickle --------------------------------------------------------------------------


def save_shapes(model: nn.Module, folder: Path) -> None:
    """Write a rival's model: its tensors, and the heads of every attention."""
    with replacing(folder / "model.safetensors") as temporary:
        temporary.write_bytes(dump_tensors({k: v.detach().contiguous() for k, v in model.state_dict().items()}))
    write_json(folder / "heads.json", {n: m.num_heads for n, m in model.named_modules() if _is_attention(m)})


def load_shapes(dense: nn.Module, folder: Path) -> nn.Module:
    """Read it back onto a copy of the dense model."""
    return with_shapes(dense, load_file(folder / "model.safetensors"), read_json(folder / "heads.json"))


def with_shapes(dense: nn.Module, state: dict[str, Tensor], heads: dict[str, int]) -> nn.Module:
    """A copy of the dense model that has other tensors, of smaller sizes."""
    model = copy.deepcopy(dense)
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in dict(module.named_buffers(recurse=False)):
            setattr(module, leaf, tensor.clone())
            continue
        setattr(module, leaf, nn.Parameter(tensor.detach().clone()))
        if leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = tensor.shape
        elif leaf == "weight" and isinstance(module, nn.Conv2d):
            module.out_channels = tensor.shape[0]
        elif leaf == "weight" and isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(tensor.shape)
    for name, count in heads.items():
        _set_heads(model.get_submodule(name), count)
    return model.eval()


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "num_heads")


def _set_heads(attention: Any, count: int) -> None:
    """The attributes in which timm's attentions repeat their sizes; Torch-Pruning leaves them as they were."""
    attention.num_heads = count
    attention.attn_dim = attention.qkv.out_features // 3
    attention.head_dim = attention.attn_dim // count
    attention.scale = attention.head_dim**-0.5


# --- Torch-Pruning ----------------------------------------------------------------------------------------------------

CRITERIA = ("L2", "Taylor", "Hessian")
SHAPES = {  # whether the residual width stays, heads go, sizes of heads shrink
    "head sizes": (True, False, True),
    "heads": (True, True, False),
    "heads and their sizes": (True, True, True),
    "MLP only": (True, False, False),
    "width, head sizes": (False, False, True),
    "width, heads and their sizes": (False, True, True),
}
FIRST, SECOND, LEFT = 500, 2000, 4  # held-out images for all candidates, then for the best ones that are LEFT


def torch_pruning(setting: Setting) -> Method:
    """The best of its criteria and of what it may prune, global and isomorphic, by held-out accuracy."""
    tp = import_module("torch_pruning")
    grads, earlier = cached(setting.scratch, f"torch-pruning-{setting.seed}", lambda: _gradients(setting))
    models: dict[str, nn.Module] = {}
    ratios, failed = {}, {}
    for criterion, shape in product(CRITERIA, SHAPES):
        name = f"{criterion}, {shape}"
        try:
            ratios[name], models[name] = _closest(
                setting, partial(_prune, tp, setting, grads, criterion, SHAPES[shape])
            )
        except Exception as error:  # whatever goes wrong inside a rival is its result
            failed[name] = _short(error)
    if not models:
        raise RivalError("; ".join(sorted(set(failed.values()))))
    first = {name: accuracy(model, setting.holdout(FIRST)) for name, model in models.items()}
    left = sorted(first, key=lambda name: -first[name])[:LEFT]
    second = {name: accuracy(models[name], setting.holdout(SECOND)) for name in left}
    chosen = max(second, key=lambda name: second[name])
    info = {"chosen": chosen, "ratio": ratios[chosen], "first": first, "second": second, "failed": failed}
    return models[chosen], info | {"earlier_seconds": earlier}


def _prune(
    tp: Any,
    setting: Setting,
    grads: dict[str, Tensor],
    criterion: str,
    shape: tuple[bool, bool, bool],
    ratio: float,
) -> nn.Module:
    keep_width, heads, head_sizes = shape
    model: Any = copy.deepcopy(setting.dense)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    attentions = [m for m in model.modules() if _is_attention(m)]
    before = [m.qkv.out_features // 3 // m.num_heads for m in attentions]
    counts = {m.qkv: m.num_heads for m in attentions}
    ignored = [model.get_classifier()]
    if keep_width:
        ignored += [layer for name, layer in layers.items() if not name.endswith(("qkv", "fc1"))]
    importance = {
        "L2": tp.importance.GroupMagnitudeImportance(p=2),
        "Taylor": tp.importance.GroupTaylorImportance(),
        # Not its accumulate_grad: in 1.6.1 it keeps the last sample alone. With the mean squares as gradients it is
        # what it is meant to be.
        "Hessian": tp.importance.GroupHessianImportance(),
    }[criterion]
    with _quiet():  # it says that it found cls_token and pos_embed
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(1, *setting.space.trace.input_size),
            importance,
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio if heads else 0.0,
            prune_num_heads=heads,
            prune_head_dims=head_sizes,
            num_heads=counts,
            ignored_layers=ignored,
        )
    for name, parameter in model.named_parameters():
        parameter.grad = grads[("square." if criterion == "Hessian" else "grad.") + name].clone()
    pruner.step()
    for attention, size in zip(attentions, before, strict=True):
        _set_heads(attention, counts[attention.qkv] or attention.num_heads)  # it keeps a block that loses all heads
        with torch.no_grad():  # the dense model's scale, which its own examples lose, folded into the queries
            for tensor in (attention.qkv.weight, attention.qkv.bias):
                tensor[: attention.attn_dim] *= (attention.head_dim / size) ** 0.5
    for parameter in model.parameters():
        parameter.grad = None
    model(torch.zeros(1, *setting.space.trace.input_size))
    return model


def _gradients(setting: Setting) -> dict[str, Tensor]:
    """The mean gradient over the calibration images, and the mean of its squares over single images."""
    parameters = dict(setting.dense.named_parameters())
    found = {f"{kind}.{n}": torch.zeros_like(p) for kind in ("grad", "square") for n, p in parameters.items()}
    for batch in rechunk(setting.calibration(), 1):
        for (name, _), grad in zip(
            parameters.items(),
            torch.autograd.grad(cross_entropy(setting.dense, batch), list(parameters.values())),
            strict=True,
        ):
            found[f"grad.{name}"] += grad / setting.images
            found[f"square.{name}"] += grad.square() / setting.images
    return found


def _closest(setting: Setting, prune: Callable[[float], nn.Module]) -> tuple[float, nn.Module]:
    """The ratio whose model costs most without exceeding the limit."""
    limit = setting.limit
    low, high = (0.0, setting.cost(setting.dense)), (1.0, 0)
    best: tuple[int, float, nn.Module] | None = None
    for _ in range(12):
        along = (low[1] - 0.998 * limit) / (low[1] - high[1])
        ratio = low[0] + (high[0] - low[0]) * min(max(along, 0.1), 0.9)
        model = prune(ratio)
        cost = setting.cost(model)
        if cost > limit:
            low = (ratio, cost)
        else:
            high = (ratio, cost)
            if best is None or cost > best[0]:
                best = (cost, ratio, model)
        if 0.996 * limit <= cost <= limit or high[0] - low[0] < 1e-3:
            break
    if best is None:
        raise RivalError(f"keeps {low[1] / setting.cost(setting.dense):.1%} of the {setting.kind} at a ratio of 1")
    return best[1], best[2]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# --- ModelOpt ---------------------------------------------------------------------------------------------------------

SCORED = 1000  # held-out images of FastNAS's score function
# Its default divisor of 32 leaves it just above 40 % of this ViT.
_MODE = [("fastnas", {"nn.Linear": {"*": {"features_ratio": [i / 20 for i in range(1, 21)], "feature_divisor": 8}}})]


def fastnas(setting: Setting) -> Method:
    """ModelOpt's FastNAS: one sensitivity for every width that it can prune, then a threshold for all of them."""
    prune = import_module("modelopt.torch.prune").prune
    count = import_module("modelopt.torch.nas.utils").inference_flops
    image = torch.zeros(1, *setting.space.trace.input_size)
    limit: float = setting.limit
    if setting.kind == "macs":  # it counts 2 for a multiply-add, and no attention, which it does not prune
        uncounted = setting.cost(setting.dense) - count(setting.dense, image, unit=1) / 2
        limit = 2 * (limit - uncounted)
    batches = list(make_loader(setting.holdout(SCORED), 250))

    def score(model: nn.Module) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hits = [(model(images).argmax(-1) == labels).float().sum() for images, labels in batches]
        return float(sum(hits)) / SCORED

    def search(constraint: dict[str, Any]) -> nn.Module:
        options = {"score_func": score, "checkpoint": str(table), "verbose": False}
        with _quiet():
            given = copy.deepcopy(setting.dense)
            return prune(given, mode=_MODE, constraints=constraint, dummy_input=image, config=options)[0]

    def sensitivities() -> dict[str, Tensor]:
        search({"params": "100%"})  # it keeps them on disk in its own way; they do not depend on the target
        return {}

    table = setting.scratch / f"fastnas-{setting.seed}.pth"
    _, earlier = cached(setting.scratch, f"fastnas-{setting.seed}", sensitivities)
    try:
        small = search({"params" if setting.kind == "params" else "flops": limit})
    except ValueError:
        raise RivalError(_smallest(setting, image)) from None
    model = with_shapes(setting.dense, small.state_dict(), {})  # without what ModelOpt hangs onto it
    if setting.cost(model) > setting.limit:
        raise RivalError(f"exceeds the target: {setting.cost(model):,} {setting.kind} of {setting.limit:,}")
    return model, {"earlier_seconds": earlier, "holdout": accuracy(model, setting.holdout(SCORED))}


def _smallest(setting: Setting, image: Tensor) -> str:
    """What to say where FastNAS cannot reach the target: how far its smallest subnet gets."""
    nas = import_module("modelopt.torch.nas.utils")
    with _quiet():
        model = import_module("modelopt.torch.nas").convert(copy.deepcopy(setting.dense), mode=_MODE)
        nas.sample(model, sample_func=min)
        model.eval()
        params = import_module("modelopt.torch.utils").param_num_from_forward(model, args=image, unit=1)
        flops = nas.inference_flops(model, image, unit=1)
    dense = setting.cost(setting.dense)
    if setting.kind == "macs":
        least = dense - (nas.inference_flops(setting.dense, image, unit=1) - flops) / 2
    else:
        least = params
    return f"cannot reach it: its smallest subnet keeps {least / dense:.2%} of the {setting.kind}"
