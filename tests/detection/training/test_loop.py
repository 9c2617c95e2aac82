"""Which checkpoint a training goes on from, after a kill while one was written; and what is said of a full disk."""

import logging
import os
from pathlib import Path

import pytest
import torch

from sidt.detection.training.loop import _last_whole
from sidt.files import saying_full


@pytest.fixture
def folder(tmp_path):
    """MMEngine's work folder of a training that was killed as it wrote the third checkpoint."""
    for epoch in (1, 2, 3):
        torch.save({"state_dict": {"weight": torch.full((1000,), float(epoch))}}, tmp_path / f"epoch_{epoch}.pth")
    whole = (tmp_path / "epoch_3.pth").read_bytes()
    (tmp_path / "epoch_3.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_2.pth"))
    return tmp_path


def test_the_one_that_is_noted(folder):
    assert _last_whole(folder) == folder / "epoch_2.pth"


@pytest.mark.parametrize("noted", ["", "epoch_9.pth", "epoch_3.pth", None])
def test_the_last_whole_one_where_the_note_leads_nowhere(folder, noted):
    if noted is None:
        (folder / "last_checkpoint").unlink()
    else:
        (folder / "last_checkpoint").write_text(noted and str(folder / noted))
    assert _last_whole(folder) == folder / "epoch_2.pth"


def test_none_where_the_first_was_not_finished(folder):
    for epoch in (1, 2):
        (folder / f"epoch_{epoch}.pth").unlink()
    (folder / "last_checkpoint").unlink()
    assert _last_whole(folder) is None
    assert _last_whole(folder / "nowhere") is None


def test_damage_that_no_kill_explains_is_said(folder, refused):
    for epoch in (1, 2):
        (folder / f"epoch_{epoch}.pth").write_bytes((folder / "epoch_3.pth").read_bytes())
    with refused("epoch_2.pth", "cannot read"):
        _last_whole(folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
@pytest.mark.parametrize("write", [lambda path: path.write_text("words"), lambda path: torch.save([1], path)])
def test_a_full_disk_is_said_where_others_write(write, refused):
    with refused("cannot write", "/runs/here", "free some space"), saying_full(Path("/runs/here")):
        write(Path("/dev/full"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
def test_a_log_that_finds_no_room_prints_no_traceback(capsys):
    log = logging.getLogger("of a full disk")
    log.addHandler(logging.FileHandler("/dev/full"))
    with saying_full(Path("/runs/here")):
        log.warning("nobody reads this")
    assert not capsys.readouterr().err and logging.raiseExceptions
    log.handlers.clear()


def test_other_errors_stay_what_they_are():
    with pytest.raises(FileNotFoundError), saying_full(Path("/runs/here")):
        Path("/nowhere/at/all").read_text()
