"""What a model gives: timm's and MMDetection's a tensor or several, Hugging Face's a mapping with names."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

# Of what a model of Hugging Face gives, the first that is there: the two heads of a distilled model, the logits, what
# is pooled, the tokens.
_ANSWERS = (("cls_logits", "distillation_logits"), ("logits",), ("pooler_output",), ("last_hidden_state",))


def heads_of(output: Any) -> list[Tensor]:
    """What a model returned, as the list of its heads' logits, each batch x classes; of one without a head features."""
    if isinstance(output, Mapping):
        found = (names for names in _ANSWERS if all(isinstance(output.get(name), Tensor) for name in names))
        return [output[name] for name in next(found, tuple(output))]
    return list(output) if isinstance(output, tuple | list) else [output]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """All tensors that a model returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_of(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from tensors_of(part)


def classes_of(model: nn.Module) -> int | None:
    """The number of classes that a model says it has: 0 without a head, ``None`` if it does not say.

    timm's say it as ``num_classes``; Hugging Face's classifiers as ``num_labels``, and their configs of any model.
    """
    count = getattr(model, "num_classes", None)
    if count is None and hasattr(getattr(model, "config", None), "num_labels"):
        count = getattr(model, "num_labels", 0)
    return count if isinstance(count, int) else None
