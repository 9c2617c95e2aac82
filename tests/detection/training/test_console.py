"""What a terminal shows of a training and a test by MMEngine: a bar and a line an epoch; the rest is in files."""

import pytest
from small_detector import small_config, small_digits

from sidt.detection.data.sources import move_data
from sidt.detection.detectors.configs import read_config
from sidt.detection.training import evaluation
from sidt.detection.training.console import told_to
from sidt.detection.training.loop import train

TWO_EPOCHS = """
train_cfg = dict(max_epochs=2, val_interval=2)
"""


@pytest.fixture
def config(tmp_path):
    small_digits(tmp_path)
    config = read_config(small_config(tmp_path, TWO_EPOCHS))
    move_data(config, tmp_path / "digits")
    return config


@pytest.mark.slow
def test_a_training_and_a_test_are_a_bar_and_a_few_lines(config, tmp_path, capfd):
    last = train(config, None, tmp_path / "states", "train")
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = [
        line for line in shown.err.replace("\r", "\n").splitlines() if line.startswith("train") and "|" not in line
    ]
    assert lines[0].startswith("train: 2 epochs x ") and lines[0].endswith("on cpu")
    assert [line.split(":")[0] for line in lines[1:3]] == ["train 1/2", "train 2/2"]
    assert lines[3].startswith("train 2/2, validation: ") and len(lines) == 4
    (log,) = last.parent.glob("console.log")
    assert "Epoch(train)" in log.read_text() and "Epoch(train)" not in shown.err

    config.load_from, config.work_dir = str(last), str(tmp_path / "work")
    evaluation.test(config, tmp_path / "evaluation")
    shown = capfd.readouterr()
    assert shown.out == "" and "test: 100%" in shown.err and "Epoch(test)" not in shown.err
    assert "Epoch(test)" in (tmp_path / "work" / "console.log").read_text()


def test_a_folder_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").touch()
    with refused(tmp_path / "file", "choose a writable"), told_to(tmp_path / "file" / "states"):
        pass
