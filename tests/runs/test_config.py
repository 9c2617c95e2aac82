from pathlib import Path

import pytest
import yaml

from sidt.runs.config import dump_config, read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "classification").glob("*.yaml"))
MINIMAL = {"model": {"name": "vit_tiny_patch16_224"}, "budget": {"params": 0.6}}


@pytest.fixture
def write(tmp_path):
    def write(tree):
        path = tmp_path / "config.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_that_ship_are_valid_and_open_with_their_command(path):
    config = read_config(path)
    assert path.read_text().startswith("# sidt ")
    assert config.budget.value()


def test_round_trip(write):
    config = read_config(write(MINIMAL), ["search.trials=7", "train.epochs=2", "search.kinds=[mlp, v]"])
    assert config.search.trials == 7 and config.train.epochs == 2 and config.search.kinds == ("mlp", "v")
    assert read_config(write(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.trails=5", ("search.trails", "unknown key", "trials", "5")),
        ("trian.epochs=5", ("trian", "unknown key", "train")),
        ("train.epoch=5", ("train.epoch", "unknown key", "epochs")),
        ("search.trials=0", ("search.trials", "0")),
        ("search.trials=many", ("search.trials", "many")),
        ("search.kinds=[depth]", ("search.kinds", "depth", "heads")),
        ("budget.params=0", ("budget", "params=0")),
        ("budget.params=-0.5", ("budget", "-0.5")),
        ("budget.params=1.5", ("budget", "1.5")),
        ("budget.params=.nan", ("budget", "nan")),
        ("score.method=guess", ("score.method", "guess", "taylor")),
        ("data.name=imagenet22k", ("data.name", "imagenet22k", "digits")),
        ("model=5", (": model: ", "a mapping with keys of name, args", "5")),
        ("data.holdout=[1]", (": data.holdout: ", "number", "[1]")),
        ("score.gates.lambdas={heads: -1}", (": score.gates.lambdas.heads: ", "greater", "-1")),
        ("score.gates.lambdas={head: 1}", (": score.gates.lambdas.head", "'heads'", "head")),
        ("data.mean=[0.5]", (": data.mean: ", "more than 1 values", "[0.5]")),
        ("nonsense", ("'nonsense'", "key=value")),
    ],
)
def test_bad_values_name_the_key_and_the_value(write, override, words, refused):
    path = write(MINIMAL)
    with refused(*words):
        read_config(path, [override])


def test_bad_files(write, tmp_path, refused):
    with refused("cannot read", "nowhere.yaml"):
        read_config(tmp_path / "nowhere.yaml")
    with refused("not YAML"):
        read_config(write("model: [unclosed"))
    with refused("not YAML", "'seed' is there twice", "line 2"):
        read_config(write("seed: 1\nseed: 2\n"))
    with refused("not YAML", "nested too deep"):
        read_config(write("model: " + "[" * 3000 + "]" * 3000))
    with refused("must be a mapping"):
        read_config(write("- a\n- b"))
    with refused("budget", "missing", "known here"):
        read_config(write({"model": {"name": "x"}}))


def test_yaml_reads_no_as_false_and_precision_may_be_no(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: vit_tiny_patch16_224}\nbudget: {params: 0.5}\nfinetune: {precision: no}\n")
    assert read_config(path).finetune.precision == "no"
    assert read_config(path, ["train.precision=no"]).train.precision == "no"
