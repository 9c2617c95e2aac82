"""What a compression is, as data: structures for layers, and the way a model is trained to them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import nn

from sidt.errors import InputError
from sidt.settings import parse, read_yaml
from sidt.space.space import DimensionSpace
from sidt.sparsity.patterns import Largest, OfEvery
from sidt.sparsity.structures import Structure
from sidt.sparsity.tiles import Tiles
from sidt.training.distillation import TeacherConfig
from sidt.training.loop import TrainConfig

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayersConfig(_Strict):
    """A structure, and the weights that have it.

    Attributes:
        layers: names of weights of linear layers and convolutions, or patterns of them (``blocks.*.mlp.fc1.weight``).
        structure: see :class:`sidt.sparsity.Structure`.
    """

    layers: Names
    structure: Structure


class ReachConfig(_Strict):
    """How a model gets near its structures before it is projected onto them.

    Attributes:
        by: ``projection`` does not train, nor does ``surgeon``, which leaves out the tiles that a refit makes up for
            best (Optimal Brain Surgeon), of all weights of a structure together; ``admm``; or a penalty on the norms of
            groups: group lasso, Structured Hoyer Square, or lasso clipped at a threshold that adapts itself.
        groups: whose norms the penalty is of: the first pattern's groups of every structure, or the units of the space.
        strength: of the penalty.
        eta: what is clipped: norms above eta times their mean.
        rounds: of ADMM; each is a training as ``train`` says.
        rho: of ADMM in its first round.
        growth: what rho is multiplied by after each round.
        threshold: with ``groups: units``, units below this share of their dimension's largest norm become zero.
        train: how; the defaults are those of a short training of a trained model.
    """

    by: Literal["projection", "surgeon", "admm", "lasso", "hoyer", "clipped"] = "projection"
    groups: Literal["structures", "units"] = "structures"
    strength: float = Field(default=1e-4, gt=0)
    eta: float = Field(default=1.0, gt=0)
    rounds: int = Field(default=4, ge=1)
    rho: float = Field(default=1e-3, gt=0)
    growth: float = Field(default=3.0, ge=1)
    threshold: float = Field(default=0.05, gt=0, lt=1)
    train: TrainConfig = TrainConfig(epochs=1, lr=1e-4, warmup_epochs=0.1, smoothing=0.0)

    @model_validator(mode="after")
    def _fits(self) -> "ReachConfig":
        if self.groups == "units" and self.by not in ("lasso", "hoyer", "clipped"):
            raise ValueError(f"by is {self.by!r}, and units are reached by a penalty: lasso, hoyer or clipped")
        return self

    @property
    def trains(self) -> bool:
        """Whether the model is trained towards its structures."""
        return self.by not in ("projection", "surgeon")


class SurveyConfig(_Strict):
    """TPrune's first training: under group lasso on all lines, to see which matrices prune well.

    Attributes:
        strength: of the penalty.
        share: a line counts as gone below this share of its weight's largest.
        train: how.
    """

    strength: float = Field(default=1e-4, gt=0)
    share: float = Field(default=0.1, gt=0, lt=1)
    train: TrainConfig = TrainConfig(epochs=1, lr=1e-4, warmup_epochs=0.1, smoothing=0.0)


class PurifyConfig(_Strict):
    """Network Purification: units that are nearly empty and matter little become zero, which loses something.

    Attributes:
        eta: the share of a unit's entries that are zero, above which it is nearly empty.
        sigma: the share of the mean importance (Taylor) of its dimension's units, below which it matters little.
    """

    eta: float = Field(default=0.9, ge=0, le=1)
    sigma: float = Field(default=0.1, ge=0)


class CompressConfig(_Strict):
    """A compression: six systems and two references are configs of it.

    Attributes:
        structures: for layers; of several that match a weight the first counts.
        align: whether the model is put into the basis first in which few units carry nearly all (:func:`sidt.align`);
            it computes the same.
        survey: which matrices prune well, in the report.
        reach: how the model gets near them.
        repair: whether what is left of linear layers is fitted to what they gave, on the calibration images of the
            run's scores; without a training towards the structures, these also say how much inputs count. Of
            classifiers alone: what a detector lost is left to its training.
        purify: what else becomes zero.
        unused: whether what is dead then leaves through a plan, exactly.
        finetune: how the model is trained under its structures afterwards; None: it is not.
        teacher: how the model as it was teaches it meanwhile; None: it does not.
        images: training images that all of it is trained on; None: all.
        fpga: a YAML file of an accelerator whose cycles are modelled, beside the config.
        crossbar: a YAML file of crossbars that are counted, beside the config.
        engine: what is to run the result faster, and is timed beside the dense model: torch's block-sparse kernels,
            convolutions on their packed kernels, torch's 2:4 kernels, or ONNX Runtime in int8.
    """

    structures: tuple[LayersConfig, ...] = ()
    align: bool = False
    survey: SurveyConfig | None = None
    reach: ReachConfig = ReachConfig()
    repair: bool = True
    purify: PurifyConfig | None = None
    unused: bool = False
    finetune: TrainConfig | None = None
    teacher: TeacherConfig | None = None
    images: int | None = Field(default=None, ge=1)
    fpga: Path | None = None
    crossbar: Path | None = None
    engine: Literal["block-sparse", "patterns", "2:4", "int8"] | None = None

    @model_validator(mode="after")
    def _does_something(self) -> "CompressConfig":
        unstructured = self.reach.groups == "units" or self.engine == "int8" or self.unused or self.survey is not None
        if not self.structures and not unstructured:
            raise ValueError(
                "there is nothing to do; give structures, survey, reach.groups: units, unused: true or engine: int8"
            )
        if not self.structures and self.reach.groups != "units" and self.reach.by != "projection":
            raise ValueError(f"reach.by is {self.reach.by!r}, and there are no structures to reach; give some")
        if self.unused and self.engine == "block-sparse":
            raise ValueError(
                "unused: true changes sizes, and engine: block-sparse needs tiles that divide; leave one out"
            )
        if self.unused and any(isinstance(p, OfEvery) for s in self.structures for p in s.structure.patterns):
            raise ValueError("unused: true changes sizes, and n:m needs inputs that m divides; leave one out")
        if self.reach.by == "surgeon" and not self.repair:
            raise ValueError("reach.by: surgeon counts on the refit of what is left; leave repair: false out")
        return self


def read_config(path: Path) -> CompressConfig:
    """A compression's config. The file's name, without its end, is the name of what comes out.

    Raises:
        InputError: it cannot be read or used, or its name is none for a folder.
    """
    if not path.stem.strip("."):
        raise InputError(f"{path}: {path.stem!r} is no name for a folder of results; rename the file")
    return parse(CompressConfig, read_yaml(path, CompressConfig), str(path))


def structures_of(
    model: nn.Module, layers: Sequence[LayersConfig], space: DimensionSpace | None
) -> dict[str, Structure]:
    """The structure of every weight that has one.

    Args:
        model: the model.
        layers: what is asked for.
        space: the model's space; tiles of several rows and columns are checked against its heads.

    Raises:
        InputError: a name matches no weight, or a structure is not for one.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel()
    }
    found: dict[str, Structure] = {}
    for config in layers:
        for pattern in config.layers:
            matched = [name for name in weights if fnmatchcase(name, pattern)]
            if not matched:
                last = pattern.rpartition(".")[0].rpartition(".")[2]
                near = [n for n in weights if last in n][:3] or list(weights)[:3]
                raise InputError(
                    f"structures: no linear layer or convolution of this {type(model).__name__} is {pattern!r}; "
                    f"some that are: {', '.join(near)}"
                )
            for name in matched:
                config.structure.check(weights[name], name)
                if space is not None:
                    _check_heads(space, name, config.structure)
                found.setdefault(name, config.structure)
    return found


def _check_heads(space: DimensionSpace, name: str, structure: Structure) -> None:
    """Check that no tile of several rows and columns straddles two heads."""
    tiles: list[Tiles] = [p.tiles for p in structure.patterns if isinstance(p, Largest)]
    for tile in tiles:
        if 1 in (tile.rows, tile.columns) or None in (tile.rows, tile.columns):
            continue
        for axis, size, what in zip(
            space.places[name].axes, (tile.rows, tile.columns), ("outputs", "inputs"), strict=False
        ):
            for symbol in (s for term in axis for s in term if isinstance(s, str) and s in space.per):
                units = space.sizes[symbol]
                if size is not None and units % size:
                    fits = [d for d in range(1, units + 1) if units % d == 0]
                    raise InputError(
                        f"{name} has {units} {what} a head ({symbol}), and tiles of {tile} would straddle heads; take "
                        f"one of {', '.join(map(str, fits))} {what}, or slice with search.round_to={size}"
                    )
