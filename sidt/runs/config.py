"""The config of a run: one YAML file, checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sidt.allocation.steps import MOST
from sidt.allocation.study import Sampler
from sidt.cost.budget import Budget
from sidt.data.preparation import DataConfig
from sidt.errors import InputError
from sidt.files import load_yaml
from sidt.importance.gates import GateConfig
from sidt.settings import parse, read_yaml
from sidt.space.families import Kind
from sidt.space.finding import search_path, use_spaces
from sidt.sparsity.lines import NormConfig
from sidt.training.distillation import TeacherConfig
from sidt.training.loop import TrainConfig


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(_Strict):
    """The dense model.

    Attributes:
        name: a timm model.
        args: keyword arguments for ``timm.create_model``.
        pretrained: whether timm loads its published weights.
        checkpoint: a state dict of your own (safetensors, or a torch file of tensors only).
    """

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = False
    checkpoint: Path | None = None


class ScoreConfig(_Strict):
    """Which importance.

    Attributes:
        method: the criterion; gates are SiDT's search stage, and hoyer is TPrune's: the norms that units have left
            after a training under Structured Hoyer Square.
        images: training images it is measured on, or that gates or norms are learned on.
        options: keyword arguments of the criterion.
        gates: how gates are learned.
        norms: how norms are learned, for hoyer.
    """

    method: Literal["random", "magnitude", "taylor", "fisher", "activation", "gates", "hoyer"] = "taylor"
    images: int = Field(default=1024, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)
    gates: GateConfig = GateConfig()
    norms: NormConfig = NormConfig()


class BudgetConfig(_Strict):
    """The budget; see :class:`sidt.Budget`."""

    params: float | int | str | None = None
    macs: float | int | str | None = None
    latency: float | str | None = None

    @model_validator(mode="after")
    def _valid(self) -> "BudgetConfig":
        self.value()
        return self

    def value(self) -> Budget:
        """The budget itself."""
        return Budget(self.params, self.macs, self.latency)


class SearchConfig(_Strict):
    """How to search.

    Attributes:
        trials: finished trials in all.
        timeout: seconds after which no new trial starts.
        images: held-out images that a trial is measured on; None: all.
        sampler: Optuna's: tpe, cmaes, gp or random.
        objective: what trials are judged by: top1, or loss (the log-likelihood of the right class, less noisy).
        warm: run folders whose searches' best multipliers are tried right after the plain ranking.
        jobs: trials at a time, in threads of one process.
        workers: processes of this machine that search together, each with its share of the threads; the same command
            on other machines joins in where they share the storage and the run's folder.
        storage: Optuna storage URL; None: SQLite in the run folder.
        pareto: one study over all budgets of the kind that the budget bounds: the curve of score against cost. The
            plan is that of the budget; `sidt slice RUN --at SHARE` takes any other point.
        kinds: the kinds of dimensions that are searched; None: see :class:`sidt.allocation.Rules`.
        freeze: patterns of dimensions that stay whole.
        min_units: the least units of a dimension; 0 lets heads and mlp go to none.
        round_to: what sizes are multiples of.
        uniform: the same sizes in every block, as timm's constructors take them.
    """

    trials: int = Field(default=40, ge=1)
    timeout: float | None = Field(default=None, gt=0)
    images: int | None = Field(default=None, ge=1)
    sampler: Sampler = "tpe"
    objective: Literal["top1", "loss"] = "loss"
    warm: tuple[Path, ...] = ()
    jobs: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=1)
    storage: str | None = None
    pareto: bool = False
    kinds: tuple[Kind, ...] | None = None
    freeze: tuple[str, ...] = ()
    min_units: int = Field(default=1, ge=0)
    round_to: int = Field(default=1, ge=1)
    uniform: bool = False


class RunConfig(_Strict):
    """A whole run, from the dense model to the fine-tuned small one.

    Attributes:
        model: the dense model.
        data: the data.
        train: how the dense model is trained; None: it comes with its weights.
        score: the importance.
        repair: whether the dense model is aligned before it is scored, and what lost inputs is refitted after every
            slice, on the images of the scores.
        budget: what the small model may cost.
        steps: in how many slices it is reached; before each, the model is aligned and scored again. The search is of
            the last one. None: as serves the budget (:func:`sidt.allocation.steps_for`).
        search: the search.
        finetune: how the small model is trained.
        teacher: how the dense model teaches it meanwhile; None: it does not.
        device: where all of it runs, unless a training says otherwise.
        seed: of the search and of random scores.
        spaces: search-space files of your own, or folders of them; default: those on the search path, which so stay
            with the run.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig | None = None
    score: ScoreConfig = ScoreConfig()
    repair: bool = True
    budget: BudgetConfig
    steps: int | None = Field(default=None, ge=1, le=MOST)
    search: SearchConfig = SearchConfig()
    finetune: TrainConfig = TrainConfig()
    teacher: TeacherConfig | None = None
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    spaces: tuple[Path, ...] = Field(default_factory=search_path)

    @model_validator(mode="after")
    def _one_base(self) -> "RunConfig":
        if self.search.pareto and (self.steps or 1) > 1:
            raise ValueError(
                f"steps is {self.steps}, but the curve of search.pareto starts from one model; set steps: 1"
            )
        return self


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a config. The search spaces that it names are searched from now on.

    Args:
        path: a YAML file.
        overrides: ``key.subkey=value`` texts that replace or add values; the value is read as YAML.

    Raises:
        InputError: the file or a value cannot be used; it names the key, the value seen and what is expected.
    """
    tree = read_yaml(path, RunConfig)
    for text in overrides:
        override(tree, text)
    config = parse(RunConfig, tree, str(path))
    use_spaces(*config.spaces)
    return config


def override(tree: dict[str, Any], text: str) -> None:
    """Set a value of a config from a text ``key.subkey=value``, whose value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InputError(f"cannot read the override {text!r}; write key=value, for example search.trials=100")
    *path, leaf = key.split(".")
    for part in path:
        inner = tree.setdefault(part, {})
        if inner is None:
            inner = tree[part] = {}
        if not isinstance(inner, dict):
            raise InputError(f"cannot set {key}: {part} is {inner!r}, not a section")
        tree = inner
    try:
        tree[leaf] = load_yaml(value)
    except yaml.YAMLError:
        raise InputError(f"cannot read the value of the override {text!r} as YAML") from None


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every value spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
