"""Names of parameters as templates: the numbers of blocks become variables."""

import re
from dataclasses import dataclass
from functools import cached_property

from torch import nn


@dataclass(frozen=True)
class Spot:
    """A name: its template, and the indices that stand for the template's variables."""

    template: str
    indices: tuple[int, ...]

    @property
    def block(self) -> str:
        """The block that a tensor belongs to: its name up to the last index, or its top-level module."""
        end = self.template.rfind("}")
        return self.literal(self.template[: end + 1]) if end >= 0 else self.template.split(".")[0]

    def literal(self, template: str) -> str:
        """A part of the template with this name's indices."""
        for index in self.indices:
            template = re.sub(r"\{[a-z]\}", str(index), template, count=1)
        return template

    @property
    def variables(self) -> tuple[str, ...]:
        """The template's variables."""
        return tuple(re.findall(r"\{([a-z])\}", self.template))


class Names:
    """The names of one model's modules and tensors as templates."""

    def __init__(self, model: nn.Module) -> None:
        """Of a model."""
        self._model = model

    @cached_property
    def _lists(self) -> set[str]:
        """Modules whose children are blocks: numbered, and not single layers."""
        found = set()
        for name, module in self._model.named_modules():
            children = [c for c in module.children() if any(True for _ in c.parameters())]
            numbered = isinstance(module, nn.ModuleList | nn.Sequential) and children
            if numbered and all(k.isdigit() for k, _ in module.named_children()):
                layers = (not list(c.children()) for c in children)
                if not any(layers):
                    found.add(name)
        return found

    @cached_property
    def _deep(self) -> bool:
        """Whether there are blocks in stages."""
        return any(sum(other == n or other.startswith(f"{n}.") for n in self._lists) > 1 for other in self._lists)

    @property
    def first_variable(self) -> str:
        """The variable of the outermost blocks."""
        return "s" if self._deep else "i"

    def spot(self, name: str) -> Spot:
        """A name as a template: ``{s}`` for a stage and ``{b}`` for a block in it, or ``{i}`` for a block."""
        parts, indices = name.split("."), []
        variables = list("sbcde" if self._deep else "ijklm")
        for at, part in enumerate(parts):
            if part.isdigit() and ".".join(name.split(".")[:at]) in self._lists and variables:
                indices.append(int(part))
                parts[at] = f"{{{variables.pop(0)}}}"
        return Spot(".".join(parts), tuple(indices))
