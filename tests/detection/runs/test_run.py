"""A detection run from end to end, on digits of a few pixels: files, budgets and MMDetection's own tools."""

import json
import shutil
import subprocess
import sys

import optuna
import pytest
import torch
from click.testing import CliRunner
from mmdet.apis import DetInferencer, inference_detector, init_detector
from pages import Page
from safetensors.torch import load_file
from small_detector import (
    CONFIGS,
    SEARCH,
    opened,
    random_detector,
    small_config,
    small_digits,
    write_checkpoint,
)
from torch.testing import assert_close

from sidt.cli.commands import cli
from sidt.detection.data.sources import source_of
from sidt.detection.detectors.checkpoints import load_detector, weights_digest
from sidt.detection.detectors.configs import build_detector, read_config
from sidt.detection.detectors.space import detector_space, parts
from sidt.detection.runs import pipeline
from sidt.detection.runs.folder import open_detector, open_run
from sidt.detection.training.loss import detector_loss, read_batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory, data):
    return small_config(tmp_path_factory.mktemp("config"), SEARCH + f"data_root = {str(data)!r}\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, config):
    return write_checkpoint(tmp_path_factory.mktemp("weights"), config)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config, data, checkpoint):
    """A finished run: a checkpoint, searched, fine-tuned, evaluated, by the command line."""
    folder = tmp_path_factory.mktemp("run") / "run"
    start = ["detect", "search", str(config), "--out", str(folder), "--data-root", str(data)]
    for arguments in (
        [*start, "--checkpoint", str(checkpoint)],
        ["detect", "finetune", str(folder)],
        ["detect", "evaluate", str(folder), "--per-class", "--draw", "2"],
    ):
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
        assert result.exit_code == 0, result.output
    return folder


def test_a_run_leaves_its_files(run):
    for name in ("dense", "sliced", "."):
        assert (run / name / "config.py").is_file() and (run / name / "model.safetensors").is_file()
        assert (run / name / "plan.json").is_file() == (name != "dense")
    found = json.loads((run / "search" / "search.json").read_text())
    assert len(found["values"]) == 2 and found["objective"].startswith("box AP on 4 held-out")
    assert (run / "detections.png").stat().st_size > 1000
    plan = json.loads((run / "plan.json").read_text())
    assert plan == json.loads((run / "search" / "plan.json").read_text())


def test_a_run_has_a_page(run):
    """Scores of every detector and class, the plan, the search, and boxes on the images."""
    result = CliRunner().invoke(cli, ["detect", "report", str(run)], catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0 and f"report -> {run / 'report.html'}" in result.output
    page, rows = Page(run / "report.html"), json.loads((run / "evaluation.json").read_text())
    page.check()
    for name, row in rows.items():
        scores = [row["bbox"][key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        shown = ["-" if score is None else f"{100 * score:.2f}" for score in scores]
        assert " ".join([name, *shown]) in page.text
        costs = [f"{row['params']:,}", f"{sum(row['macs'].values()):,}", f"{row['latency_ms']:.2f}", row["device"]]
        assert " ".join([name, *costs]) in page.text
    source = source_of(open_run(run).config, "test_dataloader")
    truth = json.loads(source.annotations.read_text())
    assert len(page.images()) == 3 * min(6, len(truth["images"]))
    shown = {image["alt"].split(",")[0] for image in page.all("img")}
    objects = sum(
        len([a for a in truth["annotations"] if a["image_id"] == i["id"]])
        for i in truth["images"]
        if i["file_name"] in shown
    )
    assert len(page.all("rect", **{"class": "truth"})) == objects
    assert len(page.plots) == 1  # the history; two trials are too few for importances
    assert set(source.classes) <= set(page.text.split("AP of boxes by class.")[1].split("Costs")[0].split())


def test_a_search_measures_once(run, tmp_path, monkeypatch):
    """The first search left the aligned detector and its moments; another budget is searched from them."""
    from sidt.detection.runs import objective

    shutil.copytree(run, tmp_path / "run")
    called = []
    real = objective.read_batches
    monkeypatch.setattr(objective, "measure_moments", lambda *a, **k: called.append("moments"))
    monkeypatch.setattr(objective, "read_batches", lambda *a, **k: called.append("images") or real(*a, **k))
    arguments = ["detect", "search", str(tmp_path / "run"), "--budget.params", "0.8"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0 and not called
    (tmp_path / "run" / "base" / "moments.safetensors").unlink()
    monkeypatch.setattr(objective, "measure_moments", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
    assert called == ["images"]


def test_a_digest_is_of_the_tensors(run, checkpoint, tmp_path):
    dense = weights_digest(run / "dense" / "model.safetensors")
    assert dense == weights_digest(checkpoint)  # another format of the same weights
    assert dense != weights_digest(run / "sliced" / "model.safetensors")


def test_the_budget_is_met_by_the_backbone(run):
    dense, sliced, tuned = (load_detector(run / name)[0] for name in ("dense", "sliced", "."))
    sizes = [sum(p.numel() for p in model.backbone.parameters()) for model in (dense, sliced, tuned)]
    assert 0.6 * 0.99 * sizes[0] <= sizes[1] <= 0.6 * sizes[0] and sizes[1] == sizes[2]
    rest = [sum(p.numel() for n, p in m.named_parameters() if not n.startswith("backbone")) for m in (dense, sliced)]
    channels = [sum(m.neck.in_channels) for m in (dense, sliced)]
    assert rest[0] - rest[1] == 16 * (channels[0] - channels[1]) >= 0  # its 1 x 1 convolutions follow the width


def test_a_run_remembers_what_is_rotated(run):
    """A width is searched with all else; a search that starts from the sliced detector keeps its first units too."""
    assert "sidt_rotated" not in (run / "dense" / "config.py").read_text()
    for name in ("sliced", "."):
        detector, config = load_detector(run / name)
        space = detector_space(detector, config.model, (3, 64, 64))
        assert space.rotated() == ["embed.1", "embed.2"]
    keep = json.loads((run / "plan.json").read_text())["keep"]
    assert all(keep[width] == list(range(len(keep[width]))) for width in ("embed.1", "embed.2"))
    scores = load_file(run / "scores.safetensors")
    directions = scores["embed.2"]
    assert directions[:8].sum() > directions[-8:].sum()  # of the aligned detector


def test_fine_tuning_moves_the_sliced_weights_only_a_little(run):
    before, after = (load_file(run / name / "model.safetensors") for name in ("sliced", "."))
    assert before.keys() == after.keys()
    moved = [(before[k] - after[k]).abs().max().item() for k in before if before[k].is_floating_point()]
    assert 0 < max(moved) < 0.01  # 2 steps of AdamW with lr 1e-4, from the sliced weights and not from a new start


def test_evaluation_has_scores_and_costs(run):
    rows = json.loads((run / "evaluation.json").read_text())
    assert list(rows) == ["dense", "sliced", "fine-tuned"]
    for name, row in rows.items():
        assert 0 <= row["bbox"]["AP"] <= 1 and set(row["bbox"]["classes"]) == set("0123456789")
        detector = load_detector(run if name == "fine-tuned" else run / name)[0]
        assert row["params"] == sum(p.numel() for p in detector.parameters()) == sum(row["params_by_part"].values())
        assert row["latency_ms"] > 0 and row["macs"]["backbone"] > row["macs"]["neck"] > 0
    assert rows["sliced"]["macs"]["backbone"] < rows["dense"]["macs"]["backbone"]
    assert rows["sliced"]["macs"]["bbox_head"] == rows["dense"]["macs"]["bbox_head"]


def test_a_detector_is_evaluated_as_its_own_model(run, moved):
    """A config of other sizes says where the images are; MMEngine would leave out all weights that do not fit it."""
    config = open_detector(open_run(run), run / "dense")[1]
    pipeline.evaluate_detector(moved, config, (3, 64, 64), latency=False)
    found, expected = (json.loads((place / "evaluation" / "results.bbox.json").read_text()) for place in (moved, run))
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == {
            **theirs,
            "score": pytest.approx(theirs["score"], rel=1e-5),
            "bbox": pytest.approx(theirs["bbox"]),
        }


def test_the_held_out_images_are_not_trained_on(run, data):
    parts = {n: json.loads((run / "data" / f"{n}.json").read_text()) for n in ("rest", "holdout", "fresh")}
    ids = {name: {image["id"] for image in part["images"]} for name, part in parts.items()}
    assert [len(ids[n]) for n in ("rest", "holdout", "fresh")] == [16, 4, 4]
    assert len(set.union(*ids.values())) == 24
    log = next((run / "states").glob("finetune-*/*/*.log")).read_text()
    assert str(run / "data" / "rest.json") in log and "annotations/train.json" not in log.split("Config:")[-1]


def test_a_search_goes_on_with_the_same_scores_and_trials(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    before = json.loads((folder / "search" / "search.json").read_text())
    said = []
    pipeline.search(open_run(folder, settings={"trials": 3}), said.append)
    after = json.loads((folder / "search" / "search.json").read_text())
    assert after["values"][:2] == before["values"] and len(after["values"]) == 3
    assert not any("scores" in line for line in said)  # they were not measured again
    assert load_detector(folder / "sliced")[0].sidt_rotated == ("embed.1", "embed.2")  # base/ was read again


@pytest.mark.slow
def test_workers_search_together(run, tmp_path, monkeypatch):
    """The first call of the first worker does nothing, so that what is there afterwards is the other's."""
    folder, calls, said = tmp_path / "copy", [], []
    shutil.copytree(run, folder)
    (folder / "study.db").unlink()
    search = pipeline.answer

    def answer(run, asked):
        calls.append(asked)
        if len(calls) == 1:
            return None
        (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
        assert study.n_trials >= 3
        return search(run, asked)

    monkeypatch.setattr(pipeline, "answer", answer)
    pipeline.search(open_run(folder, settings={"trials": 3, "workers": 2}), said.append)
    assert len(calls) == 2 and not any("scores" in line for line in said)
    found = json.loads((folder / "search" / "search.json").read_text())
    assert len(found["values"]) + found["pruned"] == 3
    assert open_run(folder).settings.workers == 1  # how many is of the one call


@pytest.mark.slow
def test_what_is_of_another_detector_is_not_taken(run, checkpoint, tmp_path, refused):
    """The same search leaves the same files; another one's slice was not fine-tuned, another detector not searched."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)

    def evaluate():
        return pipeline.evaluate(open_run(folder), latency=False)

    pipeline.take_checkpoint(open_run(folder), checkpoint)  # written again, with the same weights
    pipeline.search(open_run(folder, settings={"trials": 2}), print)
    assert "fine-tuned" in evaluate()
    pipeline.search(open_run(folder, settings={"budget": {"params": 0.8}}), print)
    with refused("model.safetensors", "another sliced detector", "sidt detect finetune"):
        evaluate()
    shutil.copytree(run / "sliced", folder / "sliced", dirs_exist_ok=True)
    with refused("sliced/plan.json", "not of one", "sidt detect search"):
        evaluate()
    weights = load_file(folder / "dense" / "model.safetensors")
    torch.save({name: tensor + 1e-3 for name, tensor in weights.items()}, tmp_path / "other.pth")
    shutil.copytree(run, folder, dirs_exist_ok=True)
    pipeline.take_checkpoint(open_run(folder), tmp_path / "other.pth")
    for step in (evaluate, lambda: pipeline.finetune(open_run(folder)), lambda: pipeline.draw(open_run(folder), 1)):
        with refused("sliced", "another dense detector", "dense", "sidt detect search"):
            step()
    shutil.rmtree(folder / "provenance")  # as earlier versions left it
    assert "fine-tuned" in evaluate()


def test_a_search_leaves_its_plan_whatever_happens_to_its_last_check(run, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "gain_on", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.search(open_run(folder, settings={"budget": {"params": 0.8}}), print)
    found = json.loads((folder / "search" / "search.json").read_text())
    assert found["budget"] == "params=0.8" and found["gain"] is None
    sizes = [sum(p.numel() for p in load_detector(folder / n)[0].backbone.parameters()) for n in ("dense", "sliced")]
    assert 0.7 < sizes[1] / sizes[0] <= 0.8
    pipeline.finetune(open_run(folder))


def test_evaluation_needs_no_training_data(config, data, checkpoint, tmp_path):
    only_test = tmp_path / "data"
    shutil.copytree(data, only_test)
    shutil.rmtree(only_test / "train")
    (only_test / "annotations" / "train.json").unlink()
    arguments = ["detect", "evaluate", str(config), "--out", str(tmp_path / "run"), "--data-root", str(only_test)]
    result = CliRunner().invoke(
        cli,
        [*arguments, "--checkpoint", str(checkpoint), "--no-latency"],
        catch_exceptions=False,
        standalone_mode=False,
    )
    assert "MACs for one 3x96x96 image" in result.output
    assert list(json.loads((tmp_path / "run" / "evaluation.json").read_text())) == ["dense"]


# --- MMDetection's own tools ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(run, tmp_path_factory):
    """The result, copied elsewhere: three files are all it is."""
    folder = tmp_path_factory.mktemp("elsewhere") / "detector"
    folder.mkdir()
    for name in ("config.py", "plan.json", "model.safetensors"):
        shutil.copy(run / name, folder / name)
    return folder


@pytest.fixture
def image(data):
    return str(sorted((data / "val").glob("*.png"))[0])


def test_init_detector_takes_it(run, moved, image):
    detector = init_detector(str(moved / "config.py"), str(moved / "model.safetensors"), device="cpu")
    assert tuple(detector.dataset_meta["classes"]) == tuple("0123456789")
    ours, config = load_detector(run)
    ours.cfg = config
    found, expected = (inference_detector(d, image).pred_instances for d in (detector, ours))
    assert len(expected.bboxes) > 0
    assert_close(found.bboxes, expected.bboxes)
    assert_close(found.scores, expected.scores)


def test_det_inferencer_takes_it(moved, image):
    inferencer = DetInferencer(str(moved / "config.py"), str(moved / "model.safetensors"), device="cpu")
    (found,) = inferencer(image, no_save_vis=True)["predictions"]
    assert len(found["bboxes"]) == len(found["scores"]) > 0


TOOL = (sys.executable, "-m", "sidt.detection.run")  # MMDetection's scripts, wherever mmcv has no operators


@pytest.mark.slow
def test_tools_test_takes_it(run, moved, tmp_path):
    command = [*TOOL, "tools/test.py", str(moved / "config.py"), str(moved / "model.safetensors")]
    done = subprocess.run([*command, "--work-dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (scores,) = [json.loads(p.read_text()) for p in tmp_path.glob("*/*.json")]
    own = json.loads((run / "evaluation.json").read_text())["fine-tuned"]["bbox"]
    assert scores["coco/bbox_mAP"] == pytest.approx(own["AP"], abs=5e-4 + 1e-9)


# --- the detector as a space ---------------------------------------------------------------------------------------


def test_the_loss_of_a_batch_is_repeatable_and_of_the_detector(config, data, checkpoint, tmp_path):
    opened_run = opened(config, data, tmp_path)
    detector = random_detector(opened_run.config)
    batches = read_batches(opened_run.config, 4, batch_size=2)
    again = read_batches(opened_run.config, 4, batch_size=2)
    first = [detector_loss(detector, batch).item() for batch in batches]
    assert first == [detector_loss(detector, batch).item() for batch in batches]
    assert first == [detector_loss(detector, batch).item() for batch in again]
    processed = detector.data_preprocessor(again[0], True)
    losses = detector(**processed, mode="loss")
    assert first[0] == pytest.approx(sum(v.item() for name in losses for v in flat(losses[name])), rel=1e-5)


def flat(value):
    return value if isinstance(value, list) else [value]


def test_another_split_needs_another_run(run, config, data, refused):
    with refused("split", "another run folder"):
        pipeline.search(opened(run, data, None, seed=5), print)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_describes_a_searchable_detector(path):
    config = read_config(path)
    source_of(config, "train_dataloader")
    text = path.read_text()
    assert text.startswith(("#", '"""')) and "Result" in text
    detector = build_detector(config)
    space = detector_space(detector, config.model, (3, 128, 192))
    rows = parts(space)
    assert sum(row.params for row in rows.values()) == sum(p.numel() for p in detector.parameters())
    assert rows["backbone"].params == sum(p.numel() for p in detector.backbone.parameters())
    assert rows["backbone"].macs > 0 and all(row.macs > 0 for name, row in rows.items() if "loss" not in name)
