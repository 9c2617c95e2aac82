"""``sidt compress`` on a tiny run: every system's config, what it writes, and mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sidt
from sidt.runs import compressed
from sidt.sparsity.packing import read_packed

CONFIGS = Path(__file__).parents[2] / "configs" / "sparsity"
TILES = {"tiles": {"rows": 4, "columns": 4}, "keep": 0.5}  # heads are of 12 units
FILES = {"config.json", "plan.json", "compressed.json", "report.md"}


@pytest.fixture
def written(tmp_path):
    """``written("tiles", images=64)``: one of SiDT's configs with short trainings, and some values replaced."""

    def write(name, **changes):
        tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        for key in ("reach", "survey"):
            if key in tree and "train" in tree[key]:
                tree[key]["train"] |= {"batch_size": 16}
        tree |= {"images": 32} if name != "int8" else {}
        for key, value in changes.items():
            *path, leaf = [int(part) if part.isdigit() else part for part in key.split(".")]
            inner = tree
            for part in path:
                inner = inner[part]
            inner[leaf] = value
        for device in ("fpga", "crossbar"):
            if device in tree:
                (tmp_path / tree[device]).write_text((CONFIGS / tree[device]).read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.mark.parametrize("name", ["ternary", "tprune", "smcd", "tiles", "surgeon", "memristor", "two_of_four", "int8"])
def test_every_system_ends_in_a_folder_that_loads(name, run, written, sidt_command):
    changes = {} if name in ("int8", "surgeon") else {"finetune": {"epochs": 1, "batch_size": 16, "smoothing": 0.0}}
    dense = name in ("tiles", "surgeon", "two_of_four")  # the sliced model's sizes are of no tile
    if name in ("tiles", "surgeon"):
        changes["structures.0.structure.patterns"] = [TILES]
    code, out, err = sidt_command("compress", run, "--config", written(name, **changes), *["--dense"] * dense)
    assert code == 0, err
    folder = run / "compressed" / (f"dense-{name}" if dense else name)
    assert f"-> {folder}" in out and {path.name for path in folder.iterdir()} >= FILES
    found = json.loads((folder / "compressed.json").read_text())
    assert 0 < found["bytes"] < found["dense_bytes"]
    assert (
        found["bytes"]
        == (folder / ("model-int8.onnx" if name == "int8" else next(folder.glob("*.safetensors")).name)).stat().st_size
    )
    model = sidt.load(folder)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    if found["weights"]:
        tensors, structures = read_packed(folder / "packed.safetensors")
        assert (folder / "structure.png").is_file() and set(structures) == set(found["weights"])
        for weight, row in found["weights"].items():
            assert int((tensors[weight] != 0).sum()) == row["nonzero"] <= row["entries"]
            assert torch.equal(structures[weight].rounded(tensors[weight], tensors[weight] != 0), tensors[weight])
    if name in ("tiles", "surgeon"):
        kept = [row["nonzero"] for row in found["weights"].values()]
        entries = [row["entries"] for row in found["weights"].values()]
        assert sum(kept) == sum(entries) / 2
        assert all(part == whole / 2 for part, whole in zip(kept, entries, strict=True)) == (name == "tiles")
        assert found["modelled"]["cycles"][1] < found["modelled"]["cycles"][0]
        assert set(found["latency_ms"]) == {"dense", "block-sparse"}
    if name == "memristor":
        assert {"before", "cut", "projected", "after"} <= set(found)
        assert found["modelled"]["crossbars"][1] <= found["modelled"]["crossbars"][0]
    if name == "tprune":
        assert set(found["survey"]) >= {"blocks.0.mlp.fc1.weight"} and (folder / "survey.png").is_file()


def test_norms_are_an_importance_of_a_run(run, sidt_command, mistake):
    options = ["--set", "score.method=hoyer", "--set", "score.norms.epochs=1", "--set", "score.images=64"]
    code, out, err = sidt_command("score", run, *options)
    assert code == 0 and "hoyer" in out, err
    scores = sidt.importance.load_importance(run / "scores.safetensors", sidt.space_for(sidt.load(run / "base")))
    assert len(set(scores.scores["hidden.0"].tolist())) > 1
    mistake("score", run, *options, "--set", "score.options={p: 2}", says=["hoyer", "score.norms"])


def test_a_dense_model_and_a_stopped_training(run, written, sidt_command, monkeypatch):
    training = {"epochs": 2, "batch_size": 16, "smoothing": 0.0}
    path = written("tiles", **{"finetune": training, "structures.0.structure.patterns": [TILES]})
    path = path.rename(path.with_name("stopped.yaml"))
    real = compressed.finetune

    def stop(at):
        real(at)
        raise KeyboardInterrupt

    monkeypatch.setattr(compressed, "finetune", stop)
    assert sidt_command("compress", run, "--config", path, "--dense")[0] == 130
    monkeypatch.setattr(compressed, "finetune", real)
    code, _, err = sidt_command("compress", run, "--config", path, "--dense")
    assert code == 0, err
    assert "admm" not in err and err.count("epochs are done") == 1  # no round of ADMM again, nor an epoch
    folder = run / "compressed" / "dense-stopped"
    assert sidt.load(folder).blocks[0].mlp.fc1.weight.shape == (96, 24)


def test_mistakes_are_one_line_and_leave_nothing(run, written, mistake, tmp_path):
    def there():
        return sorted(path for path in run.rglob("*") if path.suffix != ".lock")

    before = there()

    def wrong(says, name="tiles", **changes):
        mistake("compress", run, "--dense", "--config", written(name, **changes), says=says)

    def tiled(rows, columns, keep=0.5, **more):
        return {"structures.0.structure.patterns": [{"tiles": {"rows": rows, "columns": columns} | more, "keep": keep}]}

    nothing = "blocks.*.nothing.fc1.weight"
    wrong([nothing, "blocks.0.mlp.fc1.weight"], **{"structures.0.layers": nothing})
    wrong(["5 x 4", "outputs"], **tiled(5, 4))
    wrong(["straddle heads", "8 x 4", "round_to=8"], **tiled(8, 4))
    wrong(["1 x 7", "24 inputs"], **tiled(1, 7))
    wrong(["keep", "1.5"], **tiled(4, 4, 1.5))
    wrong(["lanes"], **{"structures.0.structure": {"lanes": 8}})
    wrong(["reach", "admm", "penalty"], **{"reach.groups": "units"})
    wrong(["nothing to do"], **{"structures": []})
    wrong(["admm", "no structures"], structures=[], unused=True)
    wrong(["layers", "at least 1"], **{"structures.0.layers": []})
    wrong(["unused", "block-sparse"], unused=True)
    wrong(["unused", "n:m"], "two_of_four", unused=True)
    wrong(["24 inputs", "5 does not divide"], "two_of_four", **{"structures.0.structure.patterns": [{"n": 2, "m": 5}]})
    wrong(["no convolution"], engine="patterns", **tiled(4, 4))
    wrong(["straddle heads", "8 x 4"], **tiled(8, 4, ragged=True))
    wrong(["cuda:7"], finetune={"epochs": 1, "device": "cuda:7"}, **tiled(4, 4))
    wrong(["surgeon", "repair"], "surgeon", repair=False)
    wrong(["surgeon", "one pattern"], "surgeon", **{"structures.0.structure.patterns": [{"n": 2, "m": 4}]})
    embedding = {"structures.0.layers": "patch_embed.proj.weight"}
    wrong(["surgeon", "linear", "patch_embed"], "surgeon", **embedding | tiled(4, 1))
    if not torch.cuda.is_available():
        wrong(["2:4", "CUDA"], "two_of_four", engine="2:4")
    mistake("compress", run, "--config", tmp_path / "none.yaml", says=[tmp_path / "none.yaml"])
    mistake("compress", run, "--config", written("tiles").rename(tmp_path / "...yaml"), says=["no name", "rename"])
    mistake("compress", tmp_path, "--config", written("tiles"), says=[tmp_path, "config.yaml"])
    assert there() == before


@pytest.mark.parametrize("name", ["tprune", "smcd", "memristor", "surgeon"])
def test_models_whose_heads_are_gone(name, run, written, sidt_command, tmp_path):
    """With ``search.min_units: 0`` a block may lose its attention."""
    folder, dense = tmp_path / "headless", sidt.load(run / "dense")
    space = sidt.space_for(dense)
    keep = {n: np.arange(d.size) for n, d in space.dimensions.items() if not d.per}
    keep |= {n: np.tile(np.arange(d.size), (2, 1)) for n, d in space.dimensions.items() if d.per}
    for heads in [h for h in space.attention if h.endswith(".0")]:
        keep[heads] = np.arange(0)
        keep |= {
            n: np.zeros((0, d.size), int) + np.arange(d.size) for n, d in space.dimensions.items() if d.per == heads
        }
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "sliced")
    sidt.save(sidt.slice_model(dense, sidt.DimensionPlan(space, keep)), folder / "sliced")
    changes = {} if name == "surgeon" else {"finetune": {"epochs": 1, "batch_size": 16, "smoothing": 0.0}}
    if name == "surgeon":
        changes = {"structures.0.structure.patterns": [TILES]}
    code, _, err = sidt_command("compress", folder, "--config", written(name, **changes))
    assert code == 0, err
