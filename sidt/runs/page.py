"""The page of a run: what is gathered for it from the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure

from sidt.allocation.curve import Point, nearest
from sidt.allocation.figures import TICKS, open_study, study_figures
from sidt.cost.complexity import Row, report
from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.report.parts import (
    Number,
    Part,
    accuracy,
    compared,
    complexity,
    cost_tile,
    details,
    facts,
    kept,
    made,
    picture,
    pictures,
    plot,
    section,
    table,
    tile,
    without_passwords,
    write,
)
from sidt.report.text import percent, quality
from sidt.runs.answers import Answers, changed_images, class_changes, grown_pairs, load_answers
from sidt.runs.config import dump_config
from sidt.runs.folder import Run
from sidt.runs.images import data_of
from sidt.space.plan import DimensionPlan

_MOST = 12  # rows of a table of changes, and pictures
_PACKAGES = ("sidt", "torch", "timm", "optuna", "plotly")


def write_page(
    run: Run,
    plan: DimensionPlan,
    found: Mapping[str, Any],
    front: Sequence[Point],
    rows: dict[str, Any],
    judged_by: str,
) -> Path:
    """Write ``report.html``.

    Args:
        run: the run.
        plan: what is kept of the dense model.
        found: search.json.
        front: the curve of a Pareto search, or nothing.
        rows: evaluation.json.
        judged_by: what trials were judged by.

    Raises:
        InputError: the answers that ``evaluate`` leaves are missing or of another evaluation.
    """
    answers = None if "neighbours" in rows["dense"] else load_answers(run, rows)
    path = run.folder / "report.html"
    before, after = rows["dense"], list(rows.values())[-1]
    final = list(rows)[-1]
    sections = [
        _asked(run, found),
        section("Accuracy and cost", "", _results(rows)),
        _curve(found, front, judged_by) if front else section("", ""),
        section("What stays", "The sizes of the plan, of the dense ones.", kept(plan)),
        _search(run, found, judged_by),
        section("", "") if answers is None else _changes(run, answers, final),
        section("Complexity", "", _complexity(plan)),
        section("How this page was made", "", made(_PACKAGES, run.device)),
    ]
    tiles = [
        cost_tile("Parameters", before["params"], after["params"]),
        cost_tile("MACs", before["macs"], after["macs"]),
        _quality_tile(before, after),
        cost_tile("Latency of one image", before["latency_ms"], after["latency_ms"], "{:.2f} ms"),
    ]
    share, (what, old), (_, new) = after["params"] / before["params"], quality(before), quality(after)
    lead = (
        f"The {final} model has {share:.1%} of the parameters of the dense one; on {after['images']:,} test images its "
        f"{what} is {compared(old, new)}."
    )
    write(path, f"{run.config.model.name} on {run.config.data.name}", lead, tiles, sections)
    return path


def _asked(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    config = run.config
    own = ", ".join(f"{key}={value}" for key, value in config.model.args.items())
    weights = config.model.checkpoint or ("timm's published ones" if config.model.pretrained else "trained in this run")
    taken = f", sliced at {found['bounds']}={found['at']} of the curve" if "at" in found else ""
    where = f" in {config.data.root}" if config.data.root else ""
    tuned = f"{config.finetune.epochs} epochs" + (", with the dense model as teacher" if config.teacher else "")
    rows = [
        ("Model", f"{config.model.name}({own})"),
        ("Weights", weights),
        ("Data", f"{config.data.name}{where}, {preparation_of(config.data)}"),
        ("Budget", f"{found['budget']}{taken}"),
        ("Importance", f"{config.score.method}, on {config.score.images:,} images"),
        ("Repair", "layers that lost inputs are refitted" if config.repair else "none"),
        ("Search", f"{config.search.trials:,} trials by {config.search.sampler}"),
        ("Fine-tuning", tuned),
        ("Repeat with", f"sidt run {run.folder / 'config.yaml'} --out FOLDER"),
    ]
    config_text = details("The whole config", without_passwords(dump_config(config)))
    return section("What was asked", "", facts(rows), config_text)


def _results(rows: Mapping[str, Any]) -> Part:
    cells = [
        [
            name,
            accuracy(quality(row)[1], row["error"]),
            row["images"],
            row["params"],
            row["macs"],
            Number(row["latency_ms"], f"{row['latency_ms']:.2f}"),
            row["device"],
        ]
        for name, row in rows.items()
    ]
    what = quality(rows["dense"])[0]
    headers = ["model", what, "test images", "params", "MACs", "latency, ms", "on"]
    caption = f"{what.capitalize()} with one standard error; latency is the median for one image."
    return table(caption, headers, cells)


def _quality_tile(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    (what, old), (_, new) = quality(before), quality(after)
    says = f"{100 * (new - old):+.2f} points, ± {100 * after['error']:.2f}"
    return tile(what.capitalize(), percent(old), percent(new), says, new)


def _curve(found: Mapping[str, Any], front: Sequence[Point], judged_by: str) -> dict[str, Any]:
    chosen = nearest(front, found.get("at") or found["multipliers"]["share"])
    kind, trials = found["bounds"], found["along"]
    plain = sorted((share, value) for share, value, is_plain in trials if is_plain)
    shown = [f"{point.params:,} params<br>{point.macs:,} MACs" for point in front]
    figure = Figure()
    figure.add_scatter(
        x=[100 * share for share, *_ in trials],
        y=[value for _, value, _ in trials],
        mode="markers",
        name="trial",
        marker={"color": "var(--other)", "size": 6, "opacity": 0.6},
    )
    if plain:
        figure.add_scatter(
            x=[100 * share for share, _ in plain],
            y=[value for _, value in plain],
            mode="lines+markers",
            name="plain ranking",
            line={"dash": "dash", "color": "var(--warn)"},
        )
    figure.add_scatter(
        x=[100 * point.share for point in front],
        y=[point.value for point in front],
        text=shown,
        mode="lines+markers",
        name="best found",
        line={"color": "var(--accent)"},
        marker={"size": 8},
        hovertemplate="%{x:.3g} %: %{y:.4f}<br>%{text}",
    )
    figure.add_scatter(
        x=[100 * chosen.share],
        y=[chosen.value],
        mode="markers",
        name="chosen",
        marker={"symbol": "circle-open", "size": 18, "color": "var(--text)", "line": {"width": 2.5}},
        hoverinfo="skip",
    )
    figure.add_hline(y=found["dense"], line={"dash": "dot", "color": "var(--quiet)"}, annotation_text="dense")
    values = [found["dense"], *(point.value for point in front), *(value for _, value in plain)]
    room = 0.1 * ((max(values) - min(values)) or 1)
    figure.update_xaxes(type="log", title=f"{kind} left, in %", tickvals=TICKS)
    figure.update_yaxes(title=judged_by, range=[min(values) - room, max(values) + room])
    caption = (
        "Left is cheaper, up is better; the circle is the point that was sliced. A trial below the picture is left out."
    )
    least = f"the smallest here has {front[0].share:.1%} of the {kind}"
    says = f"Any other point of the curve is had by: sidt slice RUN --at SHARE; {least}."
    return section("Accuracy against cost", says, plot(caption, figure))


def _search(run: Run, found: Mapping[str, Any], judged_by: str) -> dict[str, Any]:
    storage = run.config.search.storage or f"sqlite:///{run.folder / 'study.db'}"
    return search_section(storage, found, judged_by, found["bounds"])


def search_section(storage: str, found: Mapping[str, Any], judged_by: str, cost: str) -> dict[str, Any]:
    """What the search did: its verdict, and Optuna's figures if the study is there.

    Args:
        storage: Optuna storage URL.
        found: search.json.
        judged_by: what trials were judged by.
        cost: what the curve of a Pareto search is of.
    """
    gain = f"; {found['gain']['says']}" if found["gain"] else ""
    pruned = found.get("pruned", 0)
    early = f", {pruned:,} of them stopped early" if pruned else ""
    says = f"{len(found['values']) + pruned:,} trials{early}; judged by {judged_by}{gain}."
    try:
        if "study" not in found:
            raise InputError("search.json is of an earlier version and does not name its study; search again")
        figures = study_figures(open_study(storage, found["study"]), judged_by, found["dense"], cost)
    except InputError as missing:
        return section("The search", f"{says} Its history is not drawn: {missing}.")
    return section("The search", says, *(plot(caption, figure) for caption, figure in figures))


def _changes(run: Run, answers: Answers, final: str) -> dict[str, Any]:
    """Classes, mistakes and images of the test data that changed."""
    labels, before, after = answers.labels, answers.of["dense"], answers.of[final]
    changed = before != after
    lost, won = int((changed & (before == labels)).sum()), int((changed & (after == labels)).sum())
    rest = int(changed.sum()) - lost - won
    says = (
        f"{int(changed.sum()):,} of {len(labels):,} test images are answered otherwise by the {final} model: {lost:,} "
        f"that were right are wrong, {won:,} that were wrong are right, {rest:,} are wrong either way."
    )
    if not changed.any():
        return section("What changed", says)
    name = answers.classes
    classes = [
        [
            name[c],
            images,
            Number(old, percent(old)),
            Number(new, percent(new)),
            Number(new - old, f"{100 * (new - old):+.2f}"),
        ]
        for c, images, old, new in class_changes(labels, before, after, _MOST)
    ]
    pairs = [
        [name[right], name[answered], old, new, Number(new - old, f"{new - old:+,}")]
        for right, answered, old, new in grown_pairs(labels, before, after, _MOST)
    ]
    return section(
        "What changed",
        says,
        table("The classes whose accuracy changed most.", ["class", "images", "dense", final, "points"], classes)
        if classes
        else None,
        table("The mistakes that grew most.", ["true class", "answered", "dense", final, "more"], pairs)
        if pairs
        else None,
        _pictures(run, answers, final),
    )


def _pictures(run: Run, answers: Answers, final: str) -> Part:
    labels, before, after, name = answers.labels, answers.of["dense"], answers.of[final], answers.classes
    try:
        test = data_of(run.config.data).test
        if test.labels.tolist() != labels.tolist():
            raise InputError("the test images are not those that were evaluated")
        items = []
        for i in changed_images(labels, before, after, _MOST):
            true, old, new = (name[of[i]] for of in (labels, before, after))
            lines = [
                ("true", true, ""),
                ("dense", old, "right" if old == true else "wrong"),
                (final, new, "right" if new == true else "wrong"),
                ("image", Path(test.name(i)).name, ""),
            ]
            items.append(picture(test.picture(i), f"{true}; dense answers {old}, {final} answers {new}", lines))
    except InputError as missing:
        return facts([("Images", f"not shown: {missing}")])
    return pictures("Images that are answered otherwise: those that became wrong and those that became right.", items)


def _complexity(plan: DimensionPlan) -> Part:
    dense, sliced = report(plan.space, by="block"), report(plan.space, plan.sizes, by="block")
    size = " x ".join(map(str, dense.input_size))
    counted = (
        f"MACs for one {size} image, a multiply-add counted as 1, attention included. Not counted: {dense.not_counted}."
    )
    return complexity(_by_name(dense.rows), _by_name(sliced.rows), counted)


def _by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}
