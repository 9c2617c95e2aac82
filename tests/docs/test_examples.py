"""The examples run, at a small size."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from test_imports import ROOT

EXAMPLES = {
    "shrink_classifier": "--folder small --epochs 1",
    "own_space": "--epochs 1",
    "own_loss": "--epochs 1 --trials 3",
    "detector": "--folder detector --images 40 --epochs 1 --trials 2",
    "segmentation": "--folder segmentation --images 40 --epochs 1",
    "pareto_curve": "--picture curve.png --epochs 1 --trials 3",
}


def test_every_example_is_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in table for name in EXAMPLES)


NEEDS = {"detector": "mmdet", "segmentation": "mmseg"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    need = NEEDS.get(name)
    if need is not None and find_spec(need) is None:
        pytest.skip(f"the example needs {need}, which is not installed")
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"{name}.py"), *EXAMPLES[name].split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
