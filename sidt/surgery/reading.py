"""Tensors that read as something made of them: gated, masked, quantised. Names and parameters stay as they are."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn

_FUNCTIONS = "_sidt_reads"  # what each module with such tensors knows of them

Function = Callable[[Tensor], Tensor]


@cache
def _reading_class(base: type[nn.Module], tensors: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose named tensors read as what a function of the module makes of them."""

    def made(name: str) -> property:
        return property(lambda module: module.__dict__[_FUNCTIONS][name](module._parameters[name]))

    body = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**body, **{name: made(name) for name in tensors}})


class Reading:
    """Parameters of a model that read as a function of them, until :meth:`remove`.

    The state dict, the optimiser and a resumed training see the parameters themselves; forwards and gradients go
    through the functions.
    """

    def __init__(self, model: nn.Module, functions: Mapping[str, Function]) -> None:
        """Put the functions to work.

        Args:
            model: the model, changed in place.
            functions: by the names of the parameters.
        """
        self._own_classes: dict[nn.Module, type[nn.Module]] = {}
        owners: dict[str, dict[str, Function]] = {}
        for parameter, function in functions.items():
            owner, _, leaf = parameter.rpartition(".")
            owners.setdefault(owner, {})[leaf] = function
        for owner, own in owners.items():
            module = model.get_submodule(owner)
            self._own_classes[module] = type(module)
            module.__dict__[_FUNCTIONS] = own
            module.__class__ = _reading_class(type(module), tuple(sorted(own)))  # type: ignore[arg-type]

    @torch.no_grad()
    def remove(self, *, keep: bool) -> None:
        """Take the functions out of the model, classes and all.

        Args:
            keep: whether the parameters become what they read as, so that the outputs stay; else they stay.
        """
        for module, own in self._own_classes.items():
            for leaf, function in module.__dict__.pop(_FUNCTIONS).items():
                parameter = module._parameters[leaf]
                assert parameter is not None
                if keep:
                    parameter.copy_(function(parameter))
            module.__class__ = own
        self._own_classes.clear()
