"""Search spaces of your own on the command line: ``--space`` for every command, and ``sidt spaces MODEL --file``."""

import json
import re
import sys

import click
import pytest
import yaml

import sidt
from sidt.cli.commands import cli
from sidt.space.finding import SPACES, families

VIT = next(family.file for family in families() if family.file.stem == "vit")
MODEL = "vit_tiny_patch16_224"
NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc2(self.fc1(FORWARD).relu())


def small():
    return Net()
"""
SPACE = """
models: [home_made.Net]
axes: {hidden: mlp}
parameters:
  fc1.weight: hidden, _
  fc1.bias: hidden
  fc2.weight: _, hidden
  fc2.bias: _
  fc3.weight: _, hidden
attributes: {fc4.width: hidden}
norms: {norm: fc1}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of timm's ViT with another name for its width."""
    monkeypatch.setenv(SPACES, "")
    file = tmp_path / "mine.yaml"
    file.write_text(re.sub(r"\bembed\b", "stream", VIT.read_text()))
    return file


@pytest.fixture
def home_made(tmp_path, monkeypatch):
    """``home_made()`` puts a module with a class of one's own and its file where they are found."""
    monkeypatch.setenv(SPACES, "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(text: str = SPACE, forward: str = "x.flatten(1)"):
        sys.modules.pop("home_made", None)
        (tmp_path / "home_made.py").write_text(NET.replace("FORWARD", forward))
        file = tmp_path / "home_made.yaml"
        file.write_text(text)
        return file

    yield make
    sys.modules.pop("home_made", None)


def test_every_command_takes_it():
    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if isinstance(command, click.Group) else [command]

    for command in commands(cli):
        assert [option.name for option in command.params].count("space") == 1, command.name


def test_the_list_and_the_dimensions(mine, sidt_command):
    code, out, _ = sidt_command("spaces", "--space", mine)
    assert code == 0 and str(mine) in out and "swin_v2" in out
    code, out, _ = sidt_command("spaces", MODEL, "--space", mine)
    assert code == 0 and "stream: can be rotated" in out


def test_a_run_by_a_file_of_its_own(mine, tiny, tmp_path, sidt_command, monkeypatch):
    """From the config's key to its search; the run's folders need neither the option nor the key later."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny | {"spaces": [str(mine)]}))
    out = tmp_path / "run"
    for step in (["train", config, "--out", out], ["score", out]):
        code, _, err = sidt_command(*step)
        assert code == 0, err
        monkeypatch.setenv(SPACES, "")  # another process
    assert yaml.safe_load((out / "config.yaml").read_text())["spaces"] == [str(mine)]
    assert "stream" in sidt.space_for(sidt.load(out / "base")).dimensions
    monkeypatch.setenv(SPACES, str(mine))
    assert sidt_command("train", tmp_path / "tiny.yaml", "--out", tmp_path / "other")[0] == 0
    config.write_text(yaml.safe_dump(tiny))
    assert sidt_command("train", config, "--out", tmp_path / "third", "--space", mine)[0] == 0
    assert yaml.safe_load((tmp_path / "third" / "config.yaml").read_text())["spaces"] == [str(mine)]
    assert json.loads((tmp_path / "third" / "dense" / "config.json").read_text())["space"] == "space.yaml"


def test_mistakes_of_places(mine, tiny, mistake, tmp_path):
    mistake("spaces", MODEL, "--space", tmp_path / "nowhere.yaml", says=["nowhere.yaml", "No such file"])
    other = tmp_path / "other.yaml"
    other.write_text(mine.read_text())
    mistake("spaces", MODEL, "--space", mine, "--space", other, says=["VisionTransformer", "mine.yaml", "other.yaml"])
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny | {"spaces": ["nowhere.yaml"]}))
    mistake("train", config, "--out", tmp_path / "run", says=["nowhere.yaml"])


def test_a_file_is_checked(home_made, sidt_command):
    code, out, err = sidt_command("spaces", "home_made:small", "--file", home_made(), "--input", "3x2x2")
    assert code == 0, err
    assert "hidden" in out and "home_made.yaml fits Net" in out
    assert "nothing for: parameters fc3.weight, attributes fc4.width, norms norm" in out


def test_a_file_of_timms_is_checked(mine, sidt_command):
    code, out, err = sidt_command("spaces", MODEL, "--file", mine, "--input", "3x32x32")
    assert code == 0, err
    assert "mine.yaml fits VisionTransformer" in out
    assert "parameters dist_token" in out and "parameters cls_token" not in out
    assert "attributes attn_pool.num_heads" in out and "attributes blocks.{i}.attn." not in out
    assert (
        "attributes embed_dim" not in out
        and "norms blocks.{i}.norm1" not in out
        and "norms blocks.{i}.mlp.fc1_g" in out
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fc2.bias: _\n", "\n", ["fc2.bias", "home_made.yaml"]),
        ("  fc1.weight: hidden, _\n  fc1.bias: hidden\n", "", ["fc1.weight", "and 1 more: fc1.bias"]),
        ("home_made.Net]", "home_made.Nets]", ["home_made.Nets", "home_made.Net", "models"]),
        ("home_made.Net]", "home_made.Net, nowhere.at.All]", ["nowhere.at.All", "cannot be imported"]),
        ("home_made.Net]", "home_made.Net]\nforwards: home_made", ["forwards", "home_made.yaml", "FORWARDS"]),
        ("home_made.Net]", "home_made.Net]\nforwards: .here", ["forwards", "home_made.yaml", "TypeError"]),
        ("fc1.bias: hidden", "fc1.bias: hidden ++ hidden", ["home_made.yaml: fc1.bias: empty axis"]),
        ("fc1.bias: hidden", "fc1.bias: hidden.{i}", ["home_made.yaml", "fc1.bias", "indices"]),
        ("{hidden: mlp}", '{"hidden.{i}": mlp}', ["home_made.yaml: fc1.weight: ", "a variable its line does not have"]),
        ("fc3.weight: _", "blocks.{i}.{i}.weight: _", ["home_made.yaml: blocks.{i}.{i}.weight", "twice"]),
        ("fc4.width: hidden", 'fc4.width: "hidden, _"', ["home_made.yaml: fc4.width", "one number"]),
        ("norm: fc1", "norm: 'fc{i}'", ["home_made.yaml: norms: norm", "fc{i}", "no indices"]),
        ("norm: fc1", "norm: [fc1]", ["home_made.yaml: norms: norm", "separated by commas"]),
    ],
)
def test_what_is_wrong_with_a_file(old, new, says, home_made, mistake):
    assert old in SPACE
    mistake("spaces", "home_made:small", "--file", home_made(SPACE.replace(old, new)), "--input", "3x2x2", says=says)


def test_a_file_whose_slices_are_wrong(home_made, mistake):
    """Units that are seen by another: the mask and the slice are not the same."""
    file = home_made(forward="x.flatten(1)).softmax(1")
    says = [str(file), "Net", "differ", "hidden is wrong by itself", "fc1.weight, fc1.bias, fc2.weight"]
    mistake("spaces", "home_made:small", "--file", file, "--input", "3x2x2", says=says)
    file = home_made(forward="x.flatten(1)).view(-1, 6").with_suffix(".yaml")
    mistake("spaces", "home_made:small", "--file", file, "--input", "3x2x2", says=["does not run", "of its own"])


def test_lines_that_fresh_weights_would_hide(mine, mistake):
    """timm begins with biases of zero, whatever their order is."""
    right = "attn.qkv.bias: heads qk + heads qk + heads v"
    assert right in mine.read_text()
    mine.write_text(mine.read_text().replace(right, "attn.qkv.bias: heads v + heads qk + heads qk"))
    mistake("spaces", MODEL, "--file", mine, "--input", "3x32x32", says=["mine.yaml", "attn.qkv.bias"])


def test_a_package_that_is_not_there(home_made, sidt_command):
    """It may be there where another command runs, so it is said and not refused."""
    code, out, err = sidt_command("spaces", "--space", home_made(SPACE.replace("home_made.Net", "nowhere.Net")))
    assert code == 0, err
    assert any(
        "home_made.yaml" in line and "mlp (there is no package nowhere here)" in line for line in out.split("\n")
    )
    assert "no package timm" not in out


def test_mistakes_of_models(home_made, mistake, tmp_path):
    mistake("spaces", "--file", home_made(), says=["MODEL", "home_made.yaml"])
    mistake("spaces", "home_made:large", "--file", home_made(), says=["home_made:large"])
    mistake("spaces", "nowhere:large", "--file", home_made(), says=["nowhere"])
    (tmp_path / "fails.py").write_text("def small():\n    raise RuntimeError('no luck')\n")
    mistake("spaces", "fails:small", "--file", home_made(), says=["fails:small", "RuntimeError: no luck"])
    mistake("spaces", "home_made:nn.Linear", "--file", home_made(), says=["home_made:nn.Linear"])


def test_a_file_is_drafted(tmp_path, sidt_command, mistake, home_made):
    file = tmp_path / "drafted.yaml"
    code, out, err = sidt_command("spaces", MODEL, "--draft", file, "--input", "3x32x32")
    assert code == 0, err
    assert "fits VisionTransformer" in out and "attn_dim" in out
    code, out, err = sidt_command("spaces", MODEL, "--file", file, "--input", "3x32x32")
    assert code == 0 and "nothing for" not in out, err
    mistake("spaces", MODEL, "--draft", file, says=["drafted.yaml", "already there"])
    mistake("spaces", "--draft", file, says=["MODEL"])
    mistake("spaces", MODEL, "--draft", file, "--file", file, says=["from a model alone"])
    home_made(forward="x.flatten(1)).view(-1, 6")
    wrong = tmp_path / "wrong.yaml"
    mistake("spaces", "home_made:small", "--draft", wrong, "--input", "3x2x2", says=["wrong.yaml", "did not pass"])
    assert "DID NOT PASS" in wrong.read_text()
