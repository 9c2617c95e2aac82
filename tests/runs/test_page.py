"""The report as a page: all numbers and pictures in one file that loads nothing, and texts are escaped."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pages import Page, browser, check_in_a_browser
from PIL import Image

from sidt.errors import InputError
from sidt.report.parts import without_passwords
from sidt.runs.answers import changed_images, class_changes, grown_pairs, in_turn, load_answers
from sidt.runs.folder import open_run
from sidt.runs.outcome import evaluate, write_report
from sidt.runs.pipeline import run_all, search

BAD = "<script>alert(1)<b>&"
FILE = '"><img src=x onerror=alert(2)>'
CLASSES = sorted([BAD, "cat", "dog"])
MODEL = {
    "name": "vit_tiny_patch16_224",
    "args": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a curve, on an image folder whose names are HTML."""
    base, draw = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 12)):
        for label, name in enumerate(CLASSES):
            (base / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (16, 16, 3)) // 2 + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(base / "images" / part / name / f"{FILE}{i}.png")
    config = {
        "model": MODEL,
        "data": {
            "name": "folder",
            "root": str(base / "images"),
            "image_size": 16,
            "crop_pct": 1.0,  # the pictures as they are
            "holdout": 0.2,
            "augment": "none",
        },
        "train": {"epochs": 1},
        "score": {"images": 16},
        "budget": {"params": 0.5},
        "search": {"trials": 4, "pareto": True, "min_units": 0},
        "finetune": {"epochs": 1},
    }
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    run_all(open_run(base / "config.yaml", base / "run"), lambda text: None)
    return base / "run"


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "report.html")


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run"


def test_the_page_loads_nothing_and_its_parts_are_labelled(page, folder):
    page.check()
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert page.source.count("plotly.js v") == 1 and len(page.source) < 6e6


def test_every_number_of_the_evaluation_is_there(page, folder):
    rows = json.loads((folder / "evaluation.json").read_text())
    assert list(rows) == ["dense", "sliced", "fine-tuned"]
    for name, row in rows.items():
        accuracy = f"{row['top1']:.2%} ± {100 * row['error']:.2f}"
        numbers = [row["images"], f"{row['params']:,}", f"{row['macs']:,}", f"{row['latency_ms']:.2f}", row["device"]]
        assert " ".join(map(str, [name, accuracy, *numbers])) in page.text
    assert "params=0.5" in page.text and "4 trials by tpe" in page.text


def test_names_are_text(page):
    assert not [a for a in page.all("img") if not a["src"].startswith("data:")]
    assert len(page.all("b")) == len(page.all("span", **{"class": "count"}))  # no <b> of a class name
    assert BAD in page.text and FILE in page.text and BAD not in page.source
    alts = [image["alt"] for image in page.all("img")]
    assert any(BAD in alt for alt in alts)


def test_images_that_changed_are_shown_as_they_are(page, folder):
    found = json.loads((folder / "answers.json").read_text())
    assert found["classes"] == CLASSES and len(found["labels"]) == 36
    old, new = (np.array(found["answers"][name]) for name in ("dense", "fine-tuned"))
    changed = np.flatnonzero(old != new)
    assert len(changed) > 0
    assert f"{len(changed)} of 36 test images are answered otherwise" in page.text
    assert len(page.images()) == min(12, len(changed))
    files = sorted((folder.parent / "images" / "val").rglob("*.png"))
    originals = {np.asarray(Image.open(file)).tobytes() for file in files}
    assert all(np.asarray(image).tobytes() in originals for image in page.images())


def test_heads_are_drawn_as_the_plan_keeps_them(page, folder):
    keep = json.loads((folder / "plan.json").read_text())["keep"]
    drawn = [a["aria-label"] for a in page.all("span", **{"class": "heads"})]
    assert drawn == [f"heads kept of 2: {', '.join(map(str, keep[f'heads.{block}'])) or 'none'}" for block in range(2)]
    squares = [a.get("class") for a in page.all("i")]
    assert squares == ["on" if head in keep[f"heads.{block}"] else None for block in range(2) for head in range(2)]
    widths = page.source.split('class="widths"')[1].split("</figure>")[0]
    assert f"<b>{len(keep['embed'])}</b> / 24" in widths


def test_the_curve_marks_the_chosen_point(page, folder):
    found = json.loads((folder / "search" / "search.json").read_text())
    traces = {t.get("name"): t for figure in page.plots.values() for t in figure["data"]}
    ours = [(100 * p["share"], p["value"]) for p in found["front"]]
    assert list(zip(traces["best found"]["x"], traces["best found"]["y"], strict=True)) == ours
    assert (traces["chosen"]["x"][0], traces["chosen"]["y"][0]) in ours
    assert traces["chosen"]["y"][0] == found["best"]
    assert len(page.plots) == 3  # the curve, and Optuna's two figures of a study of two objectives


def test_the_complexity_table_has_its_sum(page, folder):
    rows = json.loads((folder / "evaluation.json").read_text())
    total = page.source.split("<tfoot>")[1].split("</tfoot>")[0]
    cells = re.findall(r">([^<>]+)</t[hd]", total)
    assert cells[0] == "total"
    assert f"{rows['dense']['params']:,}" in cells and f"{rows['fine-tuned']['params']:,}" in cells


def test_a_search_of_one_budget_has_its_history_and_importances(copy):
    run = open_run(copy, overrides=("search.pareto=false", "search.trials=12", "search.min_units=1"))
    search(run, lambda text: None)
    for name in ("plan.json", "config.json"):  # what was sliced is of another plan
        (copy / name).unlink()
    shutil.rmtree(copy / "sliced")
    evaluate(run)
    write_report(run)
    page = Page(copy / "report.html")
    page.check()
    history, *importances = page.plots.values()
    trials = next(t for t in history["data"] if t["name"] == "trial")
    values = json.loads((copy / "search" / "search.json").read_text())["values"]
    assert trials["y"] == values
    assert len(importances) == (len(values) >= 10)
    assert "Accuracy against cost" not in page.text and not page.images()


def test_without_its_study_or_its_images_the_page_says_so(copy):
    (copy / "study.db").unlink()
    shutil.move(copy / "config.yaml", copy / "old.yaml")
    (copy / "config.yaml").write_text((copy / "old.yaml").read_text().replace("/images", "/gone"))
    write_report(open_run(copy))
    page = Page(copy / "report.html")
    page.check()
    assert "Its history is not drawn: the study's file" in page.text and not (copy / "study.db").exists()
    assert "not shown: root" in page.text and not page.images()


def test_answers_of_another_evaluation_are_refused(copy):
    run = open_run(copy)
    before = (copy / "report.html").read_bytes()
    rows = json.loads((copy / "evaluation.json").read_text())
    text = (copy / "answers.json").read_text()
    for damaged, says in ((text[:-20], "not valid JSON"), ("[]", "damaged"), (text.replace("[0", "[1", 1), "two")):
        (copy / "answers.json").write_text(damaged)
        with pytest.raises(InputError, match=says):
            load_answers(run, rows)
    (copy / "answers.json").unlink()
    with pytest.raises(InputError, match="run `sidt evaluate"):
        write_report(run)
    assert (copy / "report.html").read_bytes() == before


def test_passwords_are_not_shown():
    text = "storage: postgresql://me:se:cret@host/db mysql+pymysql://you:p%40ss@host"
    assert without_passwords(text) == "storage: postgresql://me:***@host/db mysql+pymysql://you:***@host"
    assert without_passwords("sqlite:////tmp/a:b@c.db http://host/a") == "sqlite:////tmp/a:b@c.db http://host/a"


def test_in_a_browser_all_is_drawn_and_a_click_sorts(folder):
    with browser() as opened:
        page = check_in_a_browser(opened, folder / "report.html")
        assert page.locator(".plot").count() == 3
        table = page.locator("table.sortable")
        header = table.locator("thead th").nth(1)
        cells = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[1].textContent.replaceAll(',', '')))"
        for direction in ("descending", "ascending"):
            header.locator("button").click()
            values = table.evaluate(cells)
            assert header.get_attribute("aria-sort") == direction
            assert values == sorted(values, reverse=direction == "descending") and len(set(values)) > 2
        assert table.locator("tfoot th").inner_text() == "total"


# --- what changed ----------------------------------------------------------------------------------

LABELS = np.array([0, 0, 1, 1, 2, 2])
BEFORE = np.array([0, 0, 1, 0, 2, 1])
AFTER = np.array([0, 1, 1, 1, 0, 0])


def test_changes_by_hand():
    assert class_changes(LABELS, BEFORE, AFTER, 9) == [(0, 2, 1.0, 0.5), (1, 2, 0.5, 1.0), (2, 2, 0.5, 0.0)]
    assert grown_pairs(LABELS, BEFORE, AFTER, 9) == [(2, 0, 0, 2), (0, 1, 0, 1)]
    assert changed_images(LABELS, BEFORE, AFTER, 9) == [1, 3, 4, 5]  # lost, won, lost; then wrong either way
    assert changed_images(LABELS, BEFORE, AFTER, 2) == [1, 3]
    assert grown_pairs(LABELS, BEFORE, LABELS, 9) == [] == class_changes(LABELS, AFTER, AFTER, 9)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(10, 19)), st.integers(0, 12).map(lambda n: 2 * n))
def test_as_many_of_both_as_there_are(first, second, most):
    mixed = in_turn(first, second, most)
    assert len(mixed) == min(most, len(first) + len(second))
    ours, theirs = ([n for n in mixed if (n < 10) == small] for small in (True, False))
    assert ours == first[: len(ours)] and theirs == second[: len(theirs)]
    assert abs(len(ours) - len(theirs)) <= 1 or len(ours) == len(first) or len(theirs) == len(second)
