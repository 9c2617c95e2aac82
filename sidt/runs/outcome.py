"""What came out of a run: the evaluation of its models, and the report."""

from typing import Any

from sidt.allocation.curve import Point
from sidt.cost.complexity import measure, report, time_forward
from sidt.data.preparation import preparation_of
from sidt.errors import InputError
from sidt.export.checkpoint import load
from sidt.files import read_json, write_json, write_text
from sidt.report import text as reporting
from sidt.runs import provenance
from sidt.runs.answers import Answers
from sidt.runs.folder import CHAIN, EVALUATION, SEARCH, Run, dense_model, existing, searched_plan
from sidt.runs.images import data_of
from sidt.runs.models import original_space, space_of
from sidt.runs.quality import evaluate_on, is_blind
from sidt.space.outputs import classes_of

_EARLIER = {"top1": "top-1", "loss": "log-likelihood"}  # what search.json once called what trials were judged by


def evaluate(run: Run) -> str:
    """Top-1 on the test split, parameters, multiply-adds and latency of the models that are there.

    Without labels, how much they are like the dense model in place of top-1; see :func:`sidt.runs.quality.evaluate_on`.
    """
    folders = {"dense": run.folder / "dense", "sliced": run.folder / "sliced", "fine-tuned": run.folder}
    there = {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}
    if not there:
        raise InputError(f"no model in {run.folder}; run `sidt train {run.folder}` first")
    made_of = provenance.inputs(run.folder, CHAIN, "evaluate")
    data, rows, answered = data_of(run.config.data), {}, {}
    dense, size = dense_model(run), (3, *preparation_of(run.config.data).size)
    for name, folder in there.items():
        model = load(folder).to(run.device)
        counted = measure(model, size)
        good, given = evaluate_on(run, dense, model, data.test)
        if given is not None:
            answered[name] = given
        rows[name] = good | {
            "params": counted.params,
            "macs": counted.macs,
            "latency_ms": time_forward(model, counted.input_size, seconds=0.5),
            "device": run.device,
        }
    if answered:
        blind = is_blind(run, dense)
        classes = tuple(map(str, range(classes_of(dense) or 0))) if blind else data.classes
        Answers(classes, answered["dense"] if blind else data.test.labels, answered).save(run)
    write_json(run.folder / EVALUATION, rows)
    provenance.record(run.folder, CHAIN, "evaluate", made_of)
    return reporting.results_table(rows)


def write_report(run: Run) -> str:
    """Write ``report.md`` with its plots, and ``report.html``, from what the other steps left."""
    # Here: no other step waits for the imports of plots.
    from sidt.report import plots
    from sidt.runs.page import write_page

    model = dense_model(run)
    space = space_of(run.config, model)
    plan, search_result = searched_plan(run, original_space(model, space)), read_json(existing(run, SEARCH, "search"))
    rows = read_json(existing(run, EVALUATION, "evaluate"))
    provenance.inputs(run.folder, CHAIN, "report")
    plots.plot_kept(plan, run.folder / "kept.png")
    curve, judge = "", f"{_EARLIER.get(of := search_result['objective'], of)} on held-out images"
    if front := curve_of(run, search_result):
        kind, picture = search_result["bounds"], run.folder / "search.png"
        plots.plot_front(front, search_result["along"], search_result["dense"], kind, judge, picture)
        curve = reporting.curve_text(front, space, judge)
    else:
        plots.plot_search(
            search_result["values"],
            search_result["plain"],
            search_result["dense"],
            judge,
            run.folder / "search.png",
        )
    costs = reporting.complexity_text(report(space, by="block"), report(plan.space, plan.sizes, by="block"), "md")
    gain, at = search_result["gain"], search_result.get("at")
    taken = "" if at is None else f", sliced at {search_result['bounds']}={at} of the curve"
    gained = gain["says"] if gain else "what it gained was not judged"
    what, on = reporting.quality(rows["dense"])[0].capitalize(), next(iter(rows.values()))["device"]
    text = f"""# {run.config.model.name} on {run.config.data.name}, budget {search_result["budget"]}{taken}

{reporting.results_table(rows, "md")}

{what} on the test split, with one standard error. Latency: median of one image on {on}.

Search: {len(search_result["values"]) + search_result["pruned"]} trials; {gained}.

![units kept](kept.png)

![search](search.png)

{curve}{costs}
"""
    write_text(run.folder / "report.md", text)
    page = write_page(run, plan, search_result, front, rows, judge)
    return f"report -> {run.folder / 'report.md'}, {page}"


def curve_of(run: Run, found: dict[str, Any]) -> list[Point]:
    """The curve that the search left."""
    try:
        return [Point(**point) for point in found["front"] if found["along"]]
    except (KeyError, TypeError):
        raise InputError(f"{run.folder / SEARCH} is damaged or of an earlier version; search again") from None
