"""Training in two processes, as torchrun starts them, is training in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("train_alike.py")


def trained(folder: Path, *command: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The history and the weights that the program leaves."""
    folder.mkdir()
    words = [sys.executable, *command, str(PROGRAM), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "history.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    alone, weights = trained(tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    history, shared = trained(tmp_path / "two", *torchrun)
    assert [e["loss"] for e in history] == pytest.approx([e["loss"] for e in alone], abs=1e-5)
    assert alone[0]["loss"] - alone[-1]["loss"] > 1e-2  # something was learned
    for name, tensor in weights.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-5, rtol=1e-5)
