"""What SiDT needs to know beside an MMDetection config: its section ``sidt``, checked before anything starts."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat

from sidt.importance.placements import Placement
from sidt.runs.config import BudgetConfig
from sidt.space.families import INNER_KINDS, Kind
from sidt.space.finding import search_path


class TeacherSettings(BaseModel):
    """How much a sliced detector learns from the dense one, beside its own losses.

    Attributes:
        features: weight of the difference of the neck's maps; see ``sidt.detection.training.distillation.TeacherHook``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    features: float = Field(default=6.0, gt=0)


class GateSettings(BaseModel):
    """How gates are learned on the detector's loss; see ``sidt.detection.training.gates.GateHook``.

    Attributes:
        lambdas: the penalty's weight, for all kinds or by kind.
        speed: how many times as fast as weights gates move; updates * mean lr * speed should be 1 to 2, so that a gate
            can go from 1 to 0.
        placement: where the gates stand; see :func:`sidt.importance.gates.gated`.
        train: values of the MMDetection config for this training, by dotted key; it is not validated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lambdas: NonNegativeFloat | dict[Kind, NonNegativeFloat] = 1e-3
    speed: float = Field(default=1.0, gt=0)
    placement: Placement = "sidt"
    train: dict[str, Any] = Field(default_factory=lambda: {"train_cfg.max_epochs": 1})


class Settings(BaseModel):
    """The section ``sidt = dict(...)`` of an MMDetection config; options of the command line replace its values.

    Attributes:
        budget: what the sliced detector may cost.
        on: whether the budget is that of the backbone or of the whole detector; then the channels of neck and heads are
            searched too, of the kind ``channels``.
        input_size: channels, height, width of the image that costs are stated at; None: the test pipeline's.
        holdout: training images held out for the search, and as many again to judge what it found: a fraction, or
            a number.
        score: the importance; taylor, fisher and gates are those of the detector's own loss.
        score_images: training images that it is measured on; gates are learned on all.
        gates: how gates are learned.
        repair: whether the detector is aligned before it is scored, and what lost inputs is refitted after every
            slice, on the images of the scores.
        objective: what a trial is judged by on the held-out images: COCO box AP, or the detector's loss.
        trials: finished trials in all.
        timeout: seconds after which no new trial starts.
        workers: processes of this machine that search together, each with its share of the threads.
        storage: Optuna storage URL; None: SQLite in the run folder.
        kinds: the kinds of dimensions that are searched; None: see :class:`sidt.allocation.Rules`.
        freeze: patterns of dimensions that stay whole.
        min_units: the least units of a dimension; 0 lets heads and mlp go to none.
        round_to: what sizes are multiples of.
        finetune: values of the MMDetection config for fine-tuning, by dotted key.
        teacher: how the dense detector teaches the sliced one in fine-tuning; None: it does not.
        device: where scores and trials run.
        seed: of the held-out images, the sampler and random scores.
        spaces: search-space files of your own, or folders of them; default: those on the search path, which so stay
            with the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: BudgetConfig | None = None
    on: Literal["backbone", "detector"] = "backbone"
    input_size: tuple[int, int, int] | None = None
    holdout: float | int = Field(default=0.1, gt=0)
    score: Literal["taylor", "fisher", "magnitude", "random", "gates"] = "taylor"
    score_images: int = Field(default=128, ge=1)
    gates: GateSettings = GateSettings()
    repair: bool = True
    objective: Literal["ap", "loss"] = "ap"
    trials: int = Field(default=20, ge=1)
    timeout: float | None = Field(default=None, gt=0)
    workers: int = Field(default=1, ge=1)
    storage: str | None = None
    kinds: tuple[Kind, ...] | None = None
    freeze: tuple[str, ...] = ()
    min_units: int = Field(default=1, ge=0)
    round_to: int = Field(default=1, ge=1)
    finetune: dict[str, Any] = Field(default_factory=dict)
    teacher: TeacherSettings | None = None
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    spaces: tuple[Path, ...] = Field(default_factory=search_path)

    @property
    def searched(self) -> tuple[Kind, ...] | None:
        """The kinds that are searched: gates score no width unless they are told to."""
        return INNER_KINDS if self.kinds is None and self.score == "gates" else self.kinds
