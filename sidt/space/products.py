"""The matrix products of a forward that no layer makes, each by the sizes that it follows.

An attention multiplies q by k and by whatever else tells positions apart, takes a softmax, and multiplies v by that. So
what an image has a part in follows the size of q and k before the softmax, and that of v after it; what it has no part
in, such as a bias that is looked up by a product, follows the number of heads alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Follows = Literal["heads", "qk", "v"]

_aten = torch.ops.aten
_SOFTMAX = (_aten._softmax.default, _aten._safe_softmax.default)
# Where the two factors stand among the arguments. What is no batch is a layer's, unless both come from the image.
_BATCHES = {_aten.bmm.default: 0, _aten.baddbmm.default: 1}
_MATRICES = {_aten.mm.default: 0, _aten.addmm.default: 1}


class Products(TorchDispatchMode):
    """Counts the multiply-adds of products while a model runs.

    Attributes:
        macs: for each module, by its name as ``where`` says it, the multiply-adds by what they follow.
        in_layer: whether what runs is a layer, whose weight is no factor of such a product.
        in_attention: whether that layer is torch's attention, which has products of its own: of a learned query too.
        attends: whether what runs is torch's attention of q, k and v, which may all be learned, as DETR's first are.
    """

    def __init__(self, image: Tensor, where: Callable[[], str]) -> None:
        """Count from an image on.

        Args:
            image: what the model is given.
            where: the name of the module that runs.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, Counter[Follows]] = {}
        self.in_layer = self.in_attention = self.attends = False
        self._where = where
        # By id, with the tensors themselves so that no id comes back; they have no storage.
        self._seen: dict[int, Tensor] = {id(image): image}
        self._softened: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and note what its result is made of."""
        out = func(*args, **(kwargs or {}))
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        at = _BATCHES.get(func, _MATRICES.get(func))
        is_product = at is not None and self._note(func, *args[at : at + 2])
        if any(id(t) in self._seen for t in given):
            self._seen |= {id(t): t for t in made}
        if func in _SOFTMAX or (not is_product and any(id(t) in self._softened for t in given)):
            self._softened |= {id(t): t for t in made}
        return out

    def _note(self, func: Any, left: Tensor, right: Tensor) -> bool:
        """Count it, if it is a product that no layer makes."""
        seen = sum(id(t) in self._seen for t in (left, right))
        if seen < 2 and (func in _MATRICES or (self.in_layer and not (self.in_attention and seen))):
            return False
        softened = any(id(t) in self._softened for t in (left, right))
        follows: Follows = "heads" if not (seen or self.attends) else "v" if softened else "qk"
        self.macs.setdefault(self._where(), Counter())[follows] += left.numel() * right.shape[-1]
        return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
