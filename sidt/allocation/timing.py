"""Timing: the layers of a model at a grid of sizes, or of a sliced model beside the dense one.

Layers are timed where they run, by hooks inside forwards of the whole model: there they find the caches and the
memory that they will find in use, and their times sum up. Machines are noisy: plans are timed in turn, for several
rounds, and a low quantile counts; where torch uses one thread, what other programs take of it is not counted at all.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sidt.allocation.greedy import Rules, allocate
from sidt.cost.budget import Budget
from sidt.cost.clock import time_layers, whereabouts
from sidt.cost.latency import LayerLatencies, LayerTable, combinations, differences, grid_of, load_latencies
from sidt.errors import InputError
from sidt.importance.scores import Importance
from sidt.space.axes import names as axis_names
from sidt.space.plan import DimensionPlan
from sidt.space.space import DimensionSpace, owner_of
from sidt.space.trace import Forward
from sidt.surgery.slicing import slice_model

Float = npt.NDArray[np.float64]
Say = Callable[[str], None]
Layers = dict[str, tuple[str, tuple[str, ...]]]  # modules: what each is, and its dimensions

ROUNDS = 5
_FORWARDS = 2  # timed forwards of one plan in one round
_QUANTILE = 0.25  # of equal measurements: others only ever make them longer
_TIGHTENINGS = 3


def time_plans(
    model: nn.Module,
    plans: Sequence[DimensionPlan],
    layers: Sequence[str],
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    forward: Forward = nn.Module.__call__,
    progress: bool = True,
) -> Float:
    """Time the models of some plans, and layers inside them, in turn.

    Args:
        model: the dense model, on the device; it is not changed.
        plans: the plans; one sliced model is in memory at a time.
        layers: names of modules.
        batch: images of a forward.
        rounds: how often each plan has its turn.
        forward: runs a model on a batch of images.
        progress: whether to show a progress bar.

    Returns:
        Milliseconds of every forward; shape [rounds, plans, forwards, 1 + layers], the whole model first.
    """
    parameter, size = next(model.parameters()), plans[0].space.trace.input_size
    images = torch.randn(batch, *size, device=parameter.device, dtype=parameter.dtype)
    found = np.zeros((rounds, len(plans), _FORWARDS, 1 + len(layers)))
    with torch.inference_mode(), tqdm(total=rounds * len(plans), desc="latency", disable=not progress) as bar:
        for turn in range(rounds):
            for i, plan in enumerate(plans):
                small = slice_model(model, plan)
                small.eval()
                seen = [time_layers(small, layers, images, forward) for _ in range(1 + _FORWARDS)]
                found[turn, i] = seen[1:]  # the first is a warm-up
                bar.update()
    return found


# --- the table ----------------------------------------------------------------------------------------------------


def timed_layers(model: nn.Module, space: DimensionSpace, forward: Forward) -> Layers:
    """For each module that dimensions live in, the smallest that is called: what it is and its dimensions.

    Modules with equal dense sizes, class and shapes of inputs are the same. Several modules share a width, or the
    channels of a detector's neck and heads; they come after the other dimensions of a module, and of the widths, those
    that are rotated count. What is in none of these modules, such as the additions of a residual
    stream, does not follow the plan.
    """
    parameter = next(model.parameters())
    images = torch.zeros(1, *space.trace.input_size, device=parameter.device, dtype=parameter.dtype)
    seen: dict[str, str] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = [tuple(v.shape) if isinstance(v, Tensor) else str(v) for v in (*args, *kwargs.values())]
            seen[name] = f"{type(module).__qualname__} {inputs}"

        return hook

    whole = slice_model(model, DimensionPlan(space, {}))
    whole.eval()
    for name, module in whole.named_modules():
        module.register_forward_pre_hook(look(name), with_kwargs=True)
    with torch.inference_mode():
        forward(whole, images)

    def called(owner: str) -> str:
        while owner and owner not in seen:
            owner = owner.rpartition(".")[0]
        return owner

    owners: dict[str, list[str]] = {}
    for dimension in space.dimensions.values():
        if dimension.kind not in ("width", "channels"):
            owner = space.attention.get(dimension.per or dimension.name) or owner_of(dimension.name, space.places)
            owners.setdefault(called(owner), []).append(dimension.name)
    if "" in owners:
        raise InputError(f"{space.model}: {owners[''][0]} is in no module that is called, whose time could be taken")
    for name in _shared(space):
        for tensor, place in space.places.items():
            if any(name in axis_names(axis) for axis in place.axes):
                owner = called(tensor.rpartition(".")[0])
                owner = next((o for o in owners if owner.startswith(f"{o}.")), owner)
                if not any(o.startswith(f"{owner}." if owner else "") for o in owners if o != owner):
                    own = owners.setdefault(owner, [])
                    own += [name] * (name not in own)
    sizes = space.sizes
    return {o: (f"{seen[o]} {[sizes[n] for n in names]}", tuple(names)) for o, names in owners.items()}


def _shared(space: DimensionSpace) -> list[str]:
    """The dimensions that several modules have whose time depends on them."""
    return [d.name for d in space.dimensions.values() if d.ordered or d.kind == "channels"]


def first_units(space: DimensionSpace, sizes: Mapping[str, int]) -> DimensionPlan:
    """The plan that keeps the first units; which ones makes no difference to the time."""
    rows = {name: (sizes.get(parent, space.sizes[parent]),) for name, parent in space.per.items()}
    return DimensionPlan(space, {n: np.broadcast_to(np.arange(s), (*rows.get(n, ()), s)) for n, s in sizes.items()})


def measure_layers(
    model: nn.Module,
    space: DimensionSpace,
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    forward: Forward = nn.Module.__call__,
    say: Say | None = None,
    progress: bool = True,
) -> LayerLatencies:
    """Time the layers of a model at a grid of their sizes, on the model's device.

    The model is sliced to every point of the grid, all layers at once, so that a forward times them all; equal
    layers share their measurements. A residual width that is not rotated (:func:`sidt.align`) stays whole.

    Args:
        model: the dense model; it is not changed.
        space: its space.
        batch: images of a forward.
        rounds: how often each point of the grid is timed, in turn.
        forward: runs a model on a batch of images; default: calls it.
        say: told beforehand how long it will take.
        progress: whether to show a progress bar.

    Raises:
        InputError: layers cannot be timed apart from each other.
    """
    layers = timed_layers(model, space, forward)
    kinds: dict[str, list[str]] = {}
    for name, (what, _) in layers.items():
        kinds.setdefault(what, []).append(name)
    grids = {what: _grid(space, layers[names[0]][1]) for what, names in kinds.items()}
    points = _points(space, layers, grids)
    plans = [first_units(space, _sizes(layers, grids, point)) for point in points]
    names, begin = list(layers), time.perf_counter()
    time_plans(model, plans[:1], names, batch=batch, rounds=1, forward=forward, progress=False)
    seconds = (time.perf_counter() - begin) * rounds * len(plans)
    if say is not None:
        say(f"latency: {len(plans)} sizes of {len(names)} layers, {rounds} times: {seconds:.0f} s or less")
    seen = time_plans(model, plans, names, batch=batch, rounds=rounds, forward=forward, progress=progress)
    tables = []
    for what, members in kinds.items():
        times = np.full([len(sizes) for sizes in grids[what]], np.nan)
        for at in np.ndindex(times.shape):
            same = [
                seen[:, p, :, 1 + names.index(n)] for p, point in enumerate(points) for n in members if point[n] == at
            ]
            if same:
                times[at] = np.quantile(same, _QUANTILE)
        if np.isnan(times).any():
            raise InputError(
                f"{space.model}: the time of {members[0]} depends on more widths than can be timed together"
            )
        tables.append(LayerTable({n: layers[n][1] for n in members}, grids[what], times.tolist()))
    dense = float(np.quantile(seen[:, 0, :, 0], _QUANTILE))
    return LayerLatencies(space, whereabouts(model, space, batch), dense, tuple(tables))


def _grid(space: DimensionSpace, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    return tuple(grid_of(space.dimensions[name]) for name in names)


def _points(
    space: DimensionSpace, layers: Layers, grids: Mapping[str, tuple[tuple[int, ...], ...]]
) -> list[dict[str, tuple[int, ...]]]:
    """For each model that is timed, where every layer stands on its grid; the dense model first.

    Widths and channels are of several layers at once. Those that meet in a layer go different ways, so that it is timed
    at all of their sizes; where all are as narrow, the other dimensions go through all of theirs.
    """
    shared = _shared(space)
    ways = _apart(shared, [dims for _, dims in layers.values()])
    count = {name: len(_grid(space, [name])[0]) for name in shared}
    inner = {n: [d for d in dims if d not in count] for n, (_, dims) in layers.items()}
    turns = {n: combinations(grids[what][: len(inner[n])]) for n, (what, _) in layers.items()}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for way in product(range(max(count.values(), default=1)), repeat=max(ways.values(), default=-1) + 1):
        at = {name: max(count[name] - 1 - way[ways[name]], 0) for name in shared}
        for turn in range(max(map(len, turns.values())) if len(set(way)) < 2 else 1):
            point = {
                n: (*turns[n][turn % len(turns[n])], *(at[d] for d in dims if d in at))
                for n, (_, dims) in layers.items()
            }
            found.setdefault(str(point), point)
    return list(found.values())


def _apart(names: Sequence[str], together: Sequence[Sequence[str]]) -> dict[str, int]:
    """A number for each name, the least that no name before it has that it stands together with anywhere."""
    found: dict[str, int] = {}
    for name in names:
        taken = {found[other] for own in together if name in own for other in own if other in found}
        found[name] = next(n for n in range(len(names)) if n not in taken)
    return found


def _sizes(
    layers: Layers, grids: Mapping[str, tuple[tuple[int, ...], ...]], point: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    return {
        d: sizes[i]
        for n, (what, dims) in layers.items()
        for d, sizes, i in zip(dims, grids[what], point[n], strict=True)
    }


# --- the budget, met on the clock ---------------------------------------------------------------------------------


def fit_latency(
    model: nn.Module,
    importance: Importance,
    budget: Budget,
    latencies: LayerLatencies,
    *,
    rules: Rules | None = None,
    rounds: int = ROUNDS,
    forward: Forward = nn.Module.__call__,
    say: Say | None = None,
    progress: bool = True,
) -> LayerLatencies:
    """Tighten tables until the plan they lead to meets a budget's latency on the clock, not only in the table.

    The plain ranking's plan is sliced and timed beside the dense model. Where it saves less than the tables
    promised, that much less is believed of all savings, for at most three turns. Tables are never loosened.

    Args:
        model: the dense model, on the device that the tables are of.
        importance: its scores.
        budget: with a latency.
        latencies: the tables.
        rules: what allocation may do.
        rounds: how often both models are timed.
        forward: runs a model on a batch of images.
        say: told how each turn ended.
        progress: whether to show a progress bar.

    Raises:
        InputError: the budget cannot be met.
    """
    rules, space = rules or Rules(), importance.space
    limit = budget.bounds(1, 1, round(latencies.dense_ms * 1e6))[2]
    if limit is None:
        raise InputError(f"the budget {budget} has no latency to fit; give one, such as Budget(latency='20ms')")
    batch = int(latencies.where["batch"])
    for _ in range(_TIGHTENINGS):
        plan = allocate(importance, budget, **vars(rules), latencies=latencies)
        both = [DimensionPlan(space, {}), plan]
        seen = time_plans(model, both, (), batch=batch, rounds=rounds, forward=forward, progress=progress)
        seen = seen[..., 0].min(axis=-1)
        # Beside the dense model of the same minute: a machine that is slower today is not a plan that is.
        real = latencies.dense_ms * float(np.median(seen[:, 1] / seen[:, 0]))
        predicted = latencies.milliseconds(plan.sizes)
        if say is not None:
            say(f"latency: {real:.2f} ms measured, {predicted:.2f} ms by the table, {limit / 1e6:.2f} ms allowed")
        saved = latencies.dense_ms - predicted
        if real * 1e6 <= limit or saved <= 0:
            return latencies
        part = max(0.0, latencies.dense_ms - real) / saved
        latencies = latencies.tightened(latencies.realised * part)
    return latencies


def latencies_for(
    folder: Path,
    model: nn.Module,
    importance: Importance,
    budget: Budget,
    rules: Rules,
    say: Say,
    *,
    forward: Forward = nn.Module.__call__,
) -> LayerLatencies | None:
    """The tables that a search under a budget needs: what is in a folder, or measured, fitted and written there.

    Tables of another machine are taken as they are, and it is said: a model may be searched here for a machine
    elsewhere. A search that goes on gets the very same tables.

    Returns:
        ``None`` for a budget without a latency.
    """
    if budget.latency is None:
        return None
    space, layers = importance.space, folder / "layers.json"
    if layers.is_file():
        latencies = load_latencies(layers, space)
        here = whereabouts(model, space, int(latencies.where.get("batch", 1)))
        if other := differences(latencies.where, here):
            say(f"latency: {layers} was measured elsewhere ({other}); it is used as it is; delete it to measure here")
            return latencies
    else:
        latencies = measure_layers(model, space, forward=forward, say=say)
        latencies.save(layers)
    key = hashlib.sha256(f"{budget} {rules} {latencies.digest()}".encode()).hexdigest()[:12]
    fitted = folder / f"fitted-{key}.json"
    if not fitted.is_file():
        fit_latency(model, importance, budget, latencies, rules=rules, forward=forward, say=say).save(fitted)
    return load_latencies(fitted, space)
