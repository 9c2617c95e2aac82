"""``python -m sidt.detection.run SCRIPT``: the script runs as Python would run it, with mmcv's operators in place."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sidt.detection.run import find_script
from sidt.errors import InputError

TOOLS = Path((find_spec("mmdet") or pytest.skip("no mmdet", allow_module_level=True)).origin).parent / ".mim" / "tools"

SCRIPT = """
import json
import sys
import mmcv.ops

def report():
    return [sys.argv, __name__, __file__, sys.path[0], __doc__, mmcv.ops.get_compiler_version()]

if __name__ == "__main__":
    print(json.dumps(report()))
"""

SPAWNING = """'''Its documentation.'''
import multiprocessing
import sys

class Doubler:
    def __call__(self, x):
        return 2 * x, __name__, "sidt.detection.operators" in sys.modules

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(__doc__, pool.map(Doubler(), [4]), sys.argv[1:])
"""


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "sidt.detection.run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_a_script_sees_what_python_would_show_it(tmp_path):
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "train.py"  # a file here comes before MMDetection's of that name
    script.write_text(SCRIPT)
    result = run("tools/train.py", "config.py", "--launcher", "none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    argv, name, file, path, doc, compiler = json.loads(result.stdout.splitlines()[-1])
    assert argv == ["tools/train.py", "config.py", "--launcher", "none"]
    assert (name, Path(file), Path(path), doc) == ("__main__", script, script.parent.resolve(), None)
    assert compiler


def test_spawned_processes_have_the_script_and_the_operators(tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    result = run(script, "word")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "Its documentation. [(8, '__mp_main__', True)] ['word']"


@pytest.mark.parametrize(("arguments", "words"), [((), "no script"), (("missing.py",), "missing.py")])
def test_without_a_script_it_says_so_in_one_line(tmp_path, arguments, words):
    result = run(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_exit_codes_are_the_scripts_own(tmp_path):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(7)")
    assert run("leaving.py", cwd=tmp_path).returncode == 7


class TestMMDetectionsOwn:
    @pytest.mark.parametrize("given", ["test", "test.py", "tools/test.py", "tools/test"])
    def test_is_found_by_name(self, tmp_path, monkeypatch, given):
        monkeypatch.chdir(tmp_path)
        assert find_script(given) == TOOLS / "test.py"
        assert find_script("tools/analysis_tools/get_flops.py") == TOOLS / "analysis_tools" / "get_flops.py"

    @pytest.mark.parametrize("given", ["./test", "../tools/test.py", "/tools/test.py", "tset"])
    def test_is_not_taken_for_another(self, tmp_path, monkeypatch, given):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="train"):
            find_script(given)

    @pytest.mark.slow
    def test_runs(self, tmp_path):
        result = run("test", "--help", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "checkpoint" in result.stdout


@pytest.mark.slow
def test_torchrun_runs_it(tmp_path):
    (tmp_path / "script.py").write_text("import os, sys, mmcv.ops\nprint(os.environ['RANK'], sys.argv)")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "sidt.detection.run"]
    result = subprocess.run(
        [sys.executable, *command, "script.py", "--launcher", "pytorch"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "0 ['script.py', '--launcher', 'pytorch']" in result.stdout
