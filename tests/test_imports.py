"""Imports point down the floors of DESIGN.md, heavy ones stay in their place, and torch waits its turn."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sidt

FLOORS = (
    {"errors", "files", "options", "axes", "trace", "families", "space"},
    {"plan", "budget", "complexity", "importance", "latency", "allocation", "attention", "surgery"}
    | {"moments", "alignment", "placements", "clock", "batches", "data", "devices", "evaluation"},
    {"compensation", "training", "gates", "distillation", "checkpoint", "timing", "study"},
    {"config", "report", "runs", "pipeline", "sources"},
    {"cli", "detect_cli", "__init__", "__main__"},
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
FOLDER = Path(sidt.__file__).parent
SOURCES = {path.stem: path.read_text() for path in sorted(FOLDER.rglob("*.py"))}
ONLY = {
    "optuna": {"study", "report"},
    "timm": {"attention", "data", "training", "checkpoint"},
    "mmdet": set(),
    "mmcv": set(),
    "mmengine": set(),
}


def imported(source: str) -> set[str]:
    """Everything a module imports, wherever in it, as full names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, "imports are absolute"
    return found


def inside(source: str) -> set[str]:
    """The modules of sidt that a module imports."""
    own = [name.split(".") for name in imported(source) if name.split(".")[0] == "sidt"]
    names = {name[1] if len(name) > 1 else "__init__" for name in own}
    return {name if name in SOURCES else "__init__" for name in names}  # a public name is read from __init__


def test_every_module_has_a_floor():
    assert set(SOURCES) <= set(FLOOR), "give the new module a floor"
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    assert not {other for other in inside(SOURCES[module]) if FLOOR[other] > FLOOR[module]}


def test_there_is_no_cycle():
    TopologicalSorter({module: inside(source) for module, source in SOURCES.items()}).prepare()


@pytest.mark.parametrize("package", ONLY)
def test_packages_stay_in_their_place(package):
    users = {m for m, source in SOURCES.items() if package in {name.split(".")[0] for name in imported(source)}}
    assert users <= ONLY[package]


def test_only_attention_knows_a_backbone():
    words = ("VisionTransformer", "SwinTransformer", "PyramidVision", "WindowAttention", "timm.models.")
    for module, source in SOURCES.items():
        assert module == "attention" or not [word for word in words if word in source], module


def test_only_the_command_line_imports_detection():
    assert {m for m, s in SOURCES.items() if any("sidt.detection" in n for n in imported(s))} <= {"detect_cli"}


def test_forwards_are_imported_when_a_model_is_sliced_and_only_its_own():
    program = """if True:
        import sys, timm, sidt.surgery.slicing, sidt.space.space
        assert "sidt.surgery.attention" not in sys.modules
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
        space = sidt.space.space.space_for(model)
        sidt.surgery.slicing.slice_model(model, sidt.DimensionPlan(space, {"heads.0": [1]}))
        assert "sidt.surgery.attention" in sys.modules
        assert not {"sidt.detection", "mmdet", "mmcv", "mmengine"} & set(sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_check_sees_what_it_should():
    source = "from sidt import axes\nimport sidt.space.plan\ndef f():\n    from sidt.cli.commands import main\n"
    assert inside(source) == {"axes", "plan", "cli"}
    assert inside("from sidt import search") == inside("import sidt") == {"__init__"}


@pytest.mark.parametrize("words", [None, "", "--help", "search --help", "--version"])
def test_torch_waits_until_it_is_needed(words):
    """``None`` only imports sidt; the others are command lines."""
    program = (
        "import sidt" if words is None else f"import sidt.cli.commands\nsys.argv[1:] = {words.split()}\nsidt.cli.main()"
    )
    heavy = "[m for m in ('torch', 'timm', 'optuna', 'sklearn', 'matplotlib') if m in sys.modules]"
    check = f"import sys, atexit\natexit.register(lambda: print({heavy}, file=sys.stderr))\n{program}"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1:] == ["[]"], result.stderr
