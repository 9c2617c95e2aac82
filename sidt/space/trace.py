"""One forward on the meta device: how often each weight is used, and what attention multiplies.

Multiply-adds of a layer are its weight's size times the number of positions it is applied to, so one trace
gives the cost of every plan in closed form. Positions are those of a range of the weight's rows, since an
attention may apply the rows of q, k and v in one weight to different tokens. The totals are PyTorch's own flop
counter's, halved (it counts a multiply-add as 2).
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sidt.errors import InputError
from sidt.space.products import Follows, Products

InputSize = tuple[int, int, int]  # channels, height, width
Forward = Callable[[nn.Module, Tensor], object]  # runs a model on a batch of images


@dataclass(frozen=True)
class Trace:
    """What one image costs.

    Attributes:
        positions: for each weight of a linear layer or convolution: first row, last row + 1, and how many
            positions these rows are applied to; one entry for each range of rows that is used by itself.
        module_macs: multiply-adds under each module, by name ("" is the whole model).
        input_size: channels, height, width of the image.
        order: the parameters in the order in which they are used first.
        products: for each module, the multiply-adds of what no layer multiplies, by the sizes that they follow.
    """

    positions: Mapping[str, tuple[tuple[int, int, int], ...]]
    module_macs: Mapping[str, int]
    input_size: InputSize
    order: tuple[str, ...]
    products: Mapping[str, Mapping[Follows, int]]

    def products_in(self, module: str) -> Counter[Follows]:
        """The multiply-adds of the products under a module, by the sizes that they follow."""
        found: Counter[Follows] = Counter()
        for name, macs in self.products.items():
            if name == module or name.startswith(f"{module}."):
                found.update(macs)
        return found


def input_size_of(model: nn.Module) -> InputSize:
    """The image size that a backbone was built for, by timm's conventions or Hugging Face's.

    Raises:
        InputError: the model does not say; the caller must give it.
    """
    if (kept := getattr(model, "sidt_input_size", None)) is not None:  # of a checkpoint whose class does not say
        return kept  # type: ignore[no-any-return]
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", None) or cfg.get("input_size", (3,))[0]
    saying = (getattr(model, "patch_embed", None), model)
    built_for = next((size for m in saying if (size := getattr(m, "img_size", None))), cfg.get("input_size", (3,))[1:])
    config = getattr(model, "config", None)
    config = getattr(config, "backbone_config", None) or config  # a detector's own does not say
    if not built_for and (side := getattr(config, "image_size", None)):
        channels = getattr(config, "num_channels", channels)
        built_for = (side, side) if isinstance(side, int) else side
    if not built_for:
        raise InputError(
            f"{type(model).__name__} does not say its image size; give input_size=(3, height, width) (--input)"
        )
    height, width = built_for if isinstance(built_for, Sequence) else (built_for, built_for)
    return int(channels), int(height), int(width)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without storage: the same modules, with every tensor on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    meta = copy.deepcopy(model, memo)
    meta.eval()  # MMDetection's Swin returns nothing from it
    return meta


class _Positions(TorchFunctionMode):
    """Counts, for the rows of each weight, the positions that linear layers and convolutions apply them to."""

    def __init__(self, model: nn.Module, products: Products) -> None:
        super().__init__()
        self.products = products
        self.weights = {id(p): (name, p) for name, p in model.named_parameters()}
        self.positions: dict[str, Counter[tuple[int, int]]] = {}
        self.order: dict[str, None] = {}
        self.all_of: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0] is self.all_of:
            return True  # a model may ask whether no position is padding: none is of an image that is seen alone
        self.order |= {self.weights[id(a)][0]: None for a in (*args, *kwargs.values()) if id(a) in self.weights}
        self.products.in_layer, self.products.in_attention = func in _LAYERS, func is F.multi_head_attention_forward
        self.products.attends = func is F.scaled_dot_product_attention
        out = func(*args, **kwargs)
        self.products.in_layer = self.products.in_attention = self.products.attends = False
        if func in (Tensor.all, torch.all):
            self.all_of = out
        if func is F.linear or func in _CONVOLUTIONS:
            weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
            self._add(weight, out.numel() // max(weight.shape[0], 1))
        elif func in _TRANSPOSED:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            image: Tensor = kwargs["input"] if "input" in kwargs else args[0]
            self._add(weight, image.numel() // weight.shape[0])
        elif func is F.multi_head_attention_forward:  # the layers inside it are hidden from the mode
            for weight, positions in _layers_of_attention(*args, **kwargs):
                self._add(weight, positions)
        return out

    def _add(self, weight: Tensor, positions: int) -> None:
        """Note a use of a parameter, or of a view of some of its rows."""
        whole = weight if id(weight) in self.weights or weight._base is None else weight._base
        name, parameter = self.weights.get(id(whole), ("", weight))
        if name and len(weight) and weight[0].numel() == parameter[0].numel():
            start = int(weight.storage_offset()) // int(parameter.stride(0))
            rows = self.positions.setdefault(name, Counter())
            rows[start, start + len(weight)] += positions


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LAYERS = (F.linear, *_CONVOLUTIONS, *_TRANSPOSED, F.multi_head_attention_forward)


def _layers_of_attention(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, int]]:
    """The weights that ``F.multi_head_attention_forward`` applies, and to how many positions."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    inputs = [given[name] for name in ("query", "key", "value")]
    weights = [given.get(f"{name}_proj_weight") for name in "qkv"]
    if not given.get("use_separate_proj_weight"):
        weights = list(given["in_proj_weight"].chunk(3))
    for weight, tokens in [*zip(weights, inputs, strict=True), (given["out_proj_weight"], inputs[0])]:
        yield weight, tokens.numel() // tokens.shape[-1]


class _Root(nn.Module):
    """What is called, since the flop counter names modules from there."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, image: Tensor) -> None:
        self.run(self.model, image)


def trace(model: nn.Module, input_size: InputSize | None = None, forward: Forward | None = None) -> Trace:
    """Trace one image through a model, without computing anything.

    Args:
        model: any module; it is not changed.
        input_size: channels, height, width of the image; default: what the model was built for.
        forward: given the model and a batch of one image, runs it; default: ``model(image)``.

    Raises:
        InputError: the model does not take an image of that size.
    """
    size = input_size or input_size_of(model)
    model = meta_copy(model)
    counter = FlopCounterMode(display=False)
    image = torch.empty(1, *size, device="meta", dtype=next(model.parameters()).dtype)
    root = _Root(model, forward or nn.Module.__call__)
    prefix = f"{type(root).__name__}.model."
    products = Products(image, lambda: max(counter.mod_tracker.parents, key=len).removeprefix(prefix))
    mode = _Positions(model, products)
    try:
        # The math backend shows attention as the two matrix products it is, on every device and version.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), products, counter, mode:
            root(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{type(model).__name__} does not take an input of {'x'.join(map(str, size))}: {reason}"
        ) from error
    counts = counter.get_flop_counts()
    macs = {"": sum(counts.get("Global", {}).values()) // 2}
    for name, module in reversed(list(model.named_modules())):  # children first
        if name:
            # A list of modules is never called itself: what is under it is what is under its children.
            children = sum(macs.get(f"{name}.{child}", 0) for child, _ in module.named_children())
            macs[name] = sum(counts[prefix + name].values()) // 2 if prefix + name in counts else children
    positions = {name: tuple((*rows, n) for rows, n in used.items()) for name, used in mode.positions.items()}
    return Trace(positions, macs, size, tuple(mode.order), products.macs)
