"""What stands in for ``mmcv._ext``: found last, cheap, and frank about what it has not."""

import subprocess
import sys

import pytest
import torch
from mmcv import ops as mmcv_ops


def test_other_operators_are_refused_when_they_are_called(refused):
    carafe = mmcv_ops.CARAFE(3, 1, 2)  # importing and building is no reason to refuse
    with refused("'carafe_forward'", "pip install --no-build-isolation", "onedl-mmcv=="):
        carafe(torch.randn(1, 4, 2, 2), torch.randn(1, 9, 4, 4))
    with pytest.raises(AttributeError, match="__path__"):
        _ = sys.modules["mmcv._ext"].__path__


def test_mmcv_says_that_nothing_was_compiled():
    assert mmcv_ops.get_compiler_version().startswith("not compiled: torchvision")
    assert mmcv_ops.get_compiling_cuda_version().startswith("not compiled: torchvision")


def python(program, **options):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_sidt_detection_is_cheap_and_once_is_enough():
    program = """if True:
        import sys, sidt.detection
        from sidt.detection.operators import provide
        assert not {"torch", "torchvision", "mmcv", "mmdet", "mmengine"} & set(sys.modules)
        before = list(sys.meta_path)
        provide()
        assert sys.meta_path == before
        print(type(before[-1]).__name__)
    """
    assert python(program) == "_Finder"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_module_is_found_first(tmp_path, compiled):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").touch()
    if compiled:
        (package / "_ext.py").write_text("nms = 'compiled'")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sidt.detection, mmcv._ext; print(mmcv._ext.nms)"
    )
    assert (python(program) == "compiled") == compiled
