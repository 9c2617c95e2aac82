"""Structure inside a detector's weights, on its own losses, as a hook that any MMEngine config can name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from sidt.errors import InputError
from sidt.settings import parse
from sidt.sparsity.admm import Admm
from sidt.sparsity.config import LayersConfig, ReachConfig, structures_of
from sidt.sparsity.holding import hold
from sidt.sparsity.reaching import penalty_of
from sidt.sparsity.structures import Structure
from sidt.surgery.reading import Reading

_STATE = "sidt_structures"  # in MMEngine's checkpoint


@HOOKS.register_module()
class StructuresHook(Hook):
    """Trains a detector towards structures of its weights, or, without ``reach``, under them.

    Towards them: ``loss_admm`` (or ``loss_lasso``, ``loss_hoyer``, ``loss_clipped``) is added to the detector's
    losses. ADMM's targets are made when training starts, and again after every ``reach.train.epochs`` epochs, which is
    a round; how often that is says the config's ``max_epochs``, and ``reach.rounds`` counts as little as the rest of
    ``reach.train``. In the end the detector is near its structures: project it (:func:`sidt.sparsity.project`).

    Under them: weights read as the nearest of their structures, with the masks that they have when training starts,
    and are trained through the rounding; in the end the runner's model has what they read as. Checkpoints hold the
    weights that are trained.

    Checkpoints hold the targets and duals, or the masks, too, and a resumed training goes on with them.

    Args:
        structures: as in a compression's config: mappings with ``layers``, names of the detector's weights or patterns
            of them, and ``structure``.
        reach: as in a compression's config, on structures; None: weights are held.

    Raises:
        InputError: the settings are wrong; when training starts, a structure is for no weight of the detector, or the
            loop does not count epochs.
    """

    priority = "VERY_HIGH"  # targets are new before a checkpoint is written

    def __init__(self, structures: Sequence[Mapping[str, Any]], reach: Mapping[str, Any] | None = None) -> None:
        """Take the settings; weights are looked up when training starts."""
        self.layers = [parse(LayersConfig, one, "StructuresHook: structures") for one in structures]
        self.reach = None if reach is None else parse(ReachConfig, reach, "StructuresHook: reach")
        if self.reach is not None and (self.reach.by == "projection" or self.reach.groups == "units"):
            raise InputError(
                f"StructuresHook: reach.by={self.reach.by!r} of {self.reach.groups} is no training to structures; use "
                "admm, lasso, hoyer or clipped on structures"
            )
        self.restored: Mapping[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.admm: Admm | None = None
        self.held: Reading | None = None
        self.handle: Any = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take what an interrupted training kept; what another training started from counts for nothing."""
        self.restored = checkpoint.get(_STATE) or {}

    def before_train(self, runner: Runner) -> None:
        """Make targets or masks, or take those of the checkpoint, and put them to work."""
        detector: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
        structures = structures_of(detector, self.layers, None)
        restored = self.restored if runner.iter else {}
        if self.reach is None:
            self._hold(detector, structures, restored)
            return
        if not isinstance(runner.train_loop, EpochBasedTrainLoop) or not self.reach.train.epochs:
            raise InputError(
                f"StructuresHook trains in rounds of epochs, here {self.reach.train.epochs} under "
                f"{type(runner.train_loop).__name__}; set reach.train.epochs, and train_cfg.type=EpochBasedTrainLoop"
            )
        if self.reach.by == "admm":
            self.admm = Admm(detector, structures, self.reach.rho)
            self.admm.rho *= self.reach.growth ** (runner.epoch // self.reach.train.epochs)
            if restored:
                self.admm.load(restored)
            self._add(detector, self.admm.penalty)
        else:
            self._add(detector, penalty_of(detector, self.reach, structures, None))

    def after_train_epoch(self, runner: Runner) -> None:
        """After a round of ADMM, new targets and stronger pulls."""
        if self.admm is not None and self.reach is not None and self.every_n_epochs(runner, self.reach.train.epochs):
            self.admm.update()
            self.admm.strengthen(self.reach.growth)
            runner.logger.info(f"structures: {self.admm.distance():.1%} from the targets, next rho {self.admm.rho:.1e}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep what a training needs to go on."""
        state = self.masks if self.admm is None else self.admm.state()
        if state:
            checkpoint[_STATE] = {name: tensor.cpu() for name, tensor in state.items()}

    def after_train(self, runner: Runner) -> None:
        """Leave a detector that is plain again, and of its structures if it was held."""
        if self.handle is not None:
            self.handle.remove()
        if self.held is not None:
            self.held.remove(keep=True)
        self.admm = self.held = self.handle = None
        self.masks, self.restored = {}, {}

    def _hold(self, detector: nn.Module, structures: Mapping[str, Structure], restored: Mapping[str, Tensor]) -> None:
        weights = {name: detector.get_parameter(name) for name in structures}
        if restored and {n: m.shape for n, m in restored.items()} != {n: w.shape for n, w in weights.items()}:
            raise InputError("the checkpoint has masks of other weights; start again in another work folder")
        self.masks = dict(restored) or {name: s.mask(weights[name]) for name, s in structures.items()}
        self.held = hold(detector, structures, self.masks)

    def _add(self, detector: nn.Module, penalty: Callable[[], Tensor]) -> None:
        """Add a term to the detector's losses; predictions stay as they are."""
        assert self.reach is not None
        name = f"loss_{self.reach.by}"

        def add(detector: nn.Module, args: Any, kwargs: Mapping[str, Any], losses: Any) -> Any:
            return losses if kwargs.get("mode") != "loss" else {**losses, name: penalty()}

        self.handle = detector.register_forward_hook(add, with_kwargs=True)
