"""A detector's backbone, or all of it before its boxes are decoded, as a file."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sidt.detection.detectors.checkpoints import CONFIG, WEIGHTS, load_detector
from sidt.detection.detectors.configs import input_size_of
from sidt.errors import InputError
from sidt.runs.exports import ExportOptions, export_models
from sidt.space.trace import InputSize

Part = Literal["backbone", "detector"]


class Raw(nn.Module):
    """A detector as a function of images alone: what its heads give for each level, before boxes are decoded."""

    def __init__(self, detector: nn.Module) -> None:
        """Wrap a detector."""
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> MMDetection's ``mode="tensor"``, its lists in one tuple."""
        return tuple(leaf for leaf in tree_leaves(self.detector(images, mode="tensor")) if isinstance(leaf, Tensor))


def export_detector(
    source: str, out: Path | None, options: ExportOptions, input_size: InputSize | None, part: Part
) -> str:
    """Export the fine-tuned or sliced detector of a run, beside the dense one's export; see ``export_models``.

    Args:
        source: a run of ``sidt detect``, or a detector's folder.
        out: the file; default: ``backbone.onnx`` or ``detector.onnx`` in the folder.
        options: how.
        input_size: channels, height, width; default: the test pipeline's.
        part: of the detector.

    Raises:
        InputError: the source has no detector with weights, or the export is refused.
    """
    folder = Path(source)
    places = {"dense": folder / "dense", "sliced": folder / "sliced", "fine-tuned": folder}
    there = {name: place for name, place in places.items() if (place / WEIGHTS).is_file()}
    if not there or list(there) == ["dense"]:
        raise InputError(
            f"{source} has no {'sliced detector yet' if there else 'detector with weights'}: export takes a run folder "
            f"after `sidt detect search`, or a folder with {CONFIG} and {WEIGHTS}"
        )
    name = list(there)[-1]
    models, size = {}, input_size
    for each in {"dense", name} & set(there):
        detector, config = load_detector(there[each])
        models[each] = detector.get_submodule("backbone") if part == "backbone" else Raw(detector)
        size = size or input_size_of(config)
    assert size is not None
    ordered = {each: models[each] for each in sorted(models, key=lambda each: each == name)}
    return export_models(ordered, size, out or options.file(folder, part), options)
