"""``sidt compress``: structure inside the weights of a run's model, by the stages that a config asks for.

::

    the run's result (or its dense model) -> align -> survey (on a copy) -> reach: trained towards the structures -> cut
    -> purify: nearly empty units made zero -> unused: what is dead sliced away -> finetune: trained under the masks
    -> compressed/NAME/: config.json, plan.json, packed.safetensors; compressed.json, report.md, structure.png
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.importance.criteria import Loss as Criterion
from sidt.importance.criteria import cross_entropy, taylor
from sidt.importance.unlabelled import own_outputs
from sidt.report.kept import devices_of
from sidt.runs.exports import result_of
from sidt.runs.folder import Run, dense_model
from sidt.runs.images import data_of, sample
from sidt.runs.models import space_of
from sidt.runs.quality import gives_features, is_blind
from sidt.space.space import DimensionSpace
from sidt.sparsity.admm import train_by_admm
from sidt.sparsity.config import CompressConfig, PurifyConfig, read_config, structures_of
from sidt.sparsity.engines import check_engine
from sidt.sparsity.holding import hold, weights_of
from sidt.sparsity.lines import line_lasso, small_lines
from sidt.sparsity.patterns import Largest
from sidt.sparsity.purification import purify
from sidt.sparsity.reaching import penalty_of
from sidt.sparsity.refitting import input_moments, input_scale, refit
from sidt.sparsity.structures import Structure
from sidt.sparsity.surgeon import check_surgeon, output_fisher, surgeon_masks
from sidt.sparsity.units import unit_norms, zero_units
from sidt.sparsity.unused import remove_unused
from sidt.surgery.alignment import align
from sidt.surgery.moments import measure_moments
from sidt.training.batches import make_loader
from sidt.training.devices import resolve_device
from sidt.training.digest import weights_digest
from sidt.training.distillation import TeacherConfig, distillation_loss
from sidt.training.loop import Loss, TrainConfig, fit, label_loss

Say = Callable[[str], None]


@dataclass
class Compression:
    """A compression on its way.

    Attributes:
        run: the run.
        path: of the config.
        config: what is asked for.
        folder: where it goes.
        before: the model that it starts from.
        model: the model as it is now.
        space: its space.
        say: told what was done.
        structures: of the weights that have one.
        found: what stages found, for the report.
    """

    run: Run
    path: Path
    config: CompressConfig
    folder: Path
    before: nn.Module
    model: nn.Module
    space: DimensionSpace
    say: Say
    structures: dict[str, Structure]
    found: dict[str, Any] = field(default_factory=dict)


def opened(run: Run, path: Path, *, dense: bool, say: Say) -> Compression:
    """A compression that has not begun: everything is checked that can be.

    Raises:
        InputError: the config cannot be used, a structure is not for the model, or the run has no model.
    """
    config = read_config(path)
    if config.engine == "2:4" and not torch.cuda.is_available():
        raise InputError(f"{path}: engine: 2:4 needs a CUDA device with semi-structured kernels; leave engine out")
    before = dense_model(run) if dense else load(result_of(run.folder)[1])
    if gives_features(before) and config.teacher is not None and not config.teacher.features:
        raise InputError(f"{path}: the model gives features, and teacher.features: 0 would teach none; set it to 1")
    space = space_of(run.config, before)
    structures = structures_of(before, config.structures, space)
    devices_of(config, path.parent)
    if config.reach.by == "surgeon":
        check_surgeon(before, structures)
    elif config.reach.trains and config.reach.by != "admm":
        penalty_of(before, config.reach, structures, space)
    check_engine(before, structures, config.engine)
    for training in (config.survey.train if config.survey else None, config.reach.train, config.finetune):
        resolve_device(training.device if training else "auto")
    folder = run.folder / "compressed" / (f"dense-{path.stem}" if dense else path.stem)
    return Compression(run, path, config, folder, before, copy.deepcopy(before), space, say, structures)


# --- the stages -----------------------------------------------------------------------------------------------------


def aligned(at: Compression) -> None:
    """Put the model into the basis in which few units carry nearly all; it computes the same."""
    moments = measure_moments(at.model, tqdm(_calibration(at), desc="inputs"), space=at.space)
    at.model, _ = align(at.model, moments)
    at.space = space_of(at.run.config, at.model)


def survey(at: Compression) -> None:
    """TPrune's first training, on a copy: which matrices, and which orientations of them, prune well."""
    config = at.config.survey
    if config is None:
        return
    names = [f"{n}.weight" for n, m in at.model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel()]
    twin = copy.deepcopy(at.model)
    _train(at, twin, config.train, "survey", lambda: config.strength * line_lasso(twin, names), config.strength)
    at.found["survey"] = small_lines(twin, names, config.share)


def reach(at: Compression) -> None:
    """Train the model towards its structures."""
    config = at.config.reach
    if config.by == "admm":
        weights_of(at.model, at.structures)
        file = at.folder / "states" / f"admm-{_digest(at, at.model, config)}.safetensors"

        def train(pull: Callable[[], Tensor], round_: int) -> None:
            _train(at, at.model, config.train, f"admm {round_ + 1} of {config.rounds}", pull, round_, config)

        options: dict[str, Any] = {"rounds": config.rounds, "rho": config.rho, "growth": config.growth}
        train_by_admm(at.model, at.structures, train, **options, file=file, say=at.say)
    elif config.trains:
        penalty = penalty_of(at.model, config, at.structures, at.space)
        _train(at, at.model, config.train, "reach", penalty, config)


@torch.no_grad()
def cut(at: Compression) -> None:
    """Make zero what the structures leave out, or units that are next to nothing, and repair what is left."""
    at.model.cpu()
    if at.config.reach.groups == "units":
        norms, least = unit_norms(at.model, at.space), at.config.reach.threshold
        zero_units(at.model, at.space, {n: v < least * v.max() for n, v in norms.items() if v.numel()})
    weights, moments = weights_of(at.model, at.structures), dict[str, Tensor]()
    if at.config.repair and any(structure.patterns for structure in at.structures.values()):
        moments = input_moments(at.model, at.structures, tqdm(_calibration(at), desc="inputs"))
    if at.config.reach.by == "surgeon":
        fisher = output_fisher(at.model, at.structures, tqdm(_calibration(at), desc="gradients"), _own_outputs(at))
        masks = surgeon_masks(at.model, at.structures, moments, fisher)
    else:
        seen = {} if at.config.reach.trains else {name: input_scale(m).to(weights[name]) for name, m in moments.items()}
        masks = {n: at.structures[n].mask(weight * seen.get(n, 1.0)) for n, weight in weights.items()}
    refit(at.model, masks, moments)


def purified(at: Compression, config: PurifyConfig) -> None:
    """Network Purification by Taylor scores, each relative to the mean of its dimension."""
    loss = _own_outputs(at) if is_blind(at.run, at.before) else cross_entropy
    scores = taylor(at.model, _calibration(at), loss, space=at.space).scores
    relative = {name: s / max(s.mean(), 1e-30) if s.size else s for name, s in scores.items()}
    at.model = purify(at.model, at.space, relative, config.eta, config.sigma)


def without_unused(at: Compression) -> None:
    """Slice away what is dead, which changes no output."""
    at.model = remove_unused(at.model, at.space)
    at.space = space_of(at.run.config, at.model)
    at.structures = {n: _loosened(s) for n, s in at.structures.items() if at.model.get_parameter(n).numel()}


def finetune(at: Compression) -> None:
    """Train the model under the masks and values that it has, and round it to them."""
    masks = {name: weight != 0 for name, weight in weights_of(at.model, at.structures).items()}
    held = hold(at.model, at.structures, masks)
    try:
        if at.config.finetune is not None:
            _train(at, at.model, at.config.finetune, "finetune", None)
    finally:
        at.model.cpu()
        held.remove(keep=True)


# --- what the stages share ------------------------------------------------------------------------------------------


def _calibration(at: Compression) -> DataLoader[Any]:
    """The images of the run's scores."""
    return make_loader(sample(data_of(at.run.config.data).calibration, at.run.config.score.images), 64)


def _own_outputs(at: Compression) -> Criterion:
    """The loss that needs no labels."""
    return own_outputs(features=gives_features(at.before), seed=at.run.config.seed)


def _loosened(structure: Structure) -> Structure:
    """The same, for a weight that lost some of its rows and columns: its last tiles may be cut off."""
    patterns = [
        replace(p, tiles=replace(p.tiles, ragged=True)) if isinstance(p, Largest) else p for p in structure.patterns
    ]
    return replace(structure, patterns=tuple(patterns))


def _loss(at: Compression, model: nn.Module, config: TrainConfig) -> Loss:
    """What training is on: the labels, and the model as it was if it teaches."""
    blind, teacher = is_blind(at.run, at.before), at.config.teacher
    if teacher is None and not blind:
        return label_loss(0.0 if config.mixup or config.cutmix else config.smoothing)
    options = (teacher or TeacherConfig()).model_dump()
    if blind:
        options |= {"labels": 0.0} | ({"logits": 0.0} if gives_features(at.before) else {})
    return distillation_loss(at.before, model, smoothing=config.smoothing, **options)


def _train(
    at: Compression,
    model: nn.Module,
    config: TrainConfig,
    label: str,
    extra: Callable[[], Tensor] | None,
    *made_of: Any,
) -> None:
    """Train a model on the run's images, on its loss and perhaps a term more; a stopped training goes on."""
    own = _loss(at, model, config)
    if config.device == "auto":
        config = config.model_copy(update={"device": at.run.device})

    def loss(wrapped: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        total = own(wrapped, images, targets)
        return total if extra is None else total + extra().to(total.device)

    loss.__qualname__ = f"{own.__qualname__} for {label}"
    images: Dataset[Any] = data_of(at.run.config.data).train
    if at.config.images is not None:
        images = sample(images, at.config.images)
    folder = at.folder / "states" / f"{label.split()[0]}-{_digest(at, model, config, *made_of)}"
    fit(model, images, config, folder=folder, loss=loss, label=label)


def _digest(at: Compression, model: nn.Module, *made_of: Any) -> str:
    """Tells trainings apart by all that determines them."""
    says = [at.config.model_dump_json(), at.run.config.data.model_dump_json(), *map(str, made_of)]
    says += [weights_digest(model), weights_digest(at.before)]
    return hashlib.sha256("\n".join(says).encode()).hexdigest()[:12]
