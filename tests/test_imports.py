"""The order of the house: a folder imports only folders below it, heavy packages stay in their place, torch waits."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import sidt

ROOT = Path(__file__).parents[1]
# From the ground up. What stands beside the folders (sidt/errors.py, detection/models.py) is in GROUND or in ROOF.
FOLDERS = (
    *("space", "cost", "surgery", "data", "training", "importance", "allocation"),
    *("sparsity", "hardware", "partition", "export", "drafting", "report", "runs"),
)
DETECTION = ("operators", "data", "detectors", "training", "runs")
GROUND = {"sidt.files", "sidt.settings", "sidt.search_spaces", "sidt.configs"}
ROOF = {"sidt", "sidt.__main__", "sidt.detection", "sidt.detection.models", "sidt.detection.run"}
ONLY = {
    "optuna": {"sidt.allocation.figures", "sidt.allocation.storage", "sidt.allocation.study"},
    "plotly": {"sidt.runs.page", "sidt.report.parts"},
    "jinja2": {"sidt.report.parts"},
    "timm": {
        "sidt.surgery.attention",
        "sidt.surgery.forwards",
        "sidt.surgery.norms",
        "sidt.surgery.positions",
        "sidt.data.loading",
        "sidt.data.preparation",
        "sidt.training.loop",
        "sidt.export.models",
    },
    "huggingface_hub": {"sidt.export.hub", "sidt.runs.card"},
    "transformers": {"sidt.surgery.forwards"},  # and, by name, sidt.export.huggingface
    "mmdet": {"sidt.detection"},
    "mmcv": {"sidt.detection"},
    "mmengine": {"sidt.detection"},
    "onnx": {"sidt.export.onnx"},
    "onnxscript": {"sidt.export.onnx"},
    "onnxruntime": {"sidt.export.onnx"},
}
BACKBONES = ("VisionTransformer", "SwinTransformer", "PyramidVision", "WindowAttention", "timm.models.")


def sources() -> dict[str, str]:
    """The text of every module, by full name; a folder's face goes by the folder's name."""
    found = {}
    for folder, package in (("sidt", "sidt"), ("detection", "sidt.detection")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


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
    own = {name for name in imported(source) if name.split(".")[0] == "sidt"}
    return {name if name in SOURCES else name.rpartition(".")[0] for name in own}


def floor(module: str) -> float:
    """The floor that a module's folder stands on."""
    if module == "sidt.errors":
        return 0
    if module in GROUND:
        return 1 if module == "sidt.files" else 1.5  # a YAML file is read before its values are checked
    if module in ROOF:
        return 100
    parts = module.split(".")[1:]
    if parts[0] == "detection":
        return 20 + DETECTION.index(parts[1]) if parts[1] in DETECTION else -1
    if parts[0] == "cli":  # above detection, whose modules it finds by name
        return 30
    return 2 + FOLDERS.index(parts[0]) if parts[0] in FOLDERS else -1


def house(module: str) -> str:
    """The folder of a module, or its own name beside the folders."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["detection"] else 2])


@pytest.mark.parametrize("module", SOURCES)
def test_a_folder_imports_only_folders_below_it(module):
    assert floor(module) >= 0, f"{module} stands in no folder of the house; give the folder its place in the order"
    others = {other for other in inside(SOURCES[module]) if house(other) != house(module)}
    assert not {other for other in others if floor(other) >= floor(module)}


def test_there_is_no_cycle():
    TopologicalSorter({module: inside(source) for module, source in SOURCES.items()}).prepare()
    folders: dict[str, set[str]] = {}
    for module, source in SOURCES.items():
        folders.setdefault(house(module), set()).update({house(other) for other in inside(source)} - {house(module)})
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("package", ONLY)
def test_packages_stay_in_their_place(package):
    users = {m for m, source in SOURCES.items() if package in {name.split(".")[0] for name in imported(source)}}
    places = ONLY[package] | ({"sidt.detection"} if package == "timm" else set())  # detectors have timm's layers too
    assert not {user for user in users if user not in places and not under(user, places)}


def under(module: str, packages: set[str]) -> bool:
    """Whether a module is one of some packages' own."""
    return any(module.startswith(f"{package}.") for package in packages)


def test_no_backbone_has_a_name_outside_its_places():
    for module, source in SOURCES.items():
        if module != "sidt.surgery.attention" and not under(
            module, {"sidt.detection.detectors", "sidt.surgery.forwards"}
        ):
            assert not [word for word in BACKBONES if word in source], module


def test_nothing_below_the_command_line_imports_detection():
    users = {m for m, s in SOURCES.items() if any(under(n, {"sidt.detection"}) for n in imported(s))}
    assert {user for user in users if not under(user, {"sidt.detection"})} <= {"sidt.cli.detect", "sidt.detection"}


@pytest.mark.parametrize("face", [p.parent for f in ("sidt", "detection") for p in (ROOT / f).rglob("__init__.pyi")])
def test_a_face_names_what_is_there(face):
    parts = face.relative_to(ROOT).parts
    package = import_module(".".join(parts if parts[0] == "sidt" else ("sidt", *parts)))
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = package.nothing_like_this


def test_public_names_of_the_first_version_stay():
    assert sidt.importance.taylor and sidt.importance.random
    first = """Budget DimensionPlan align allocate compensate distillation_loss finetune gated importance learn_gates
    load load_plan measure measure_layers measure_moments save search slice_model space_for"""
    assert set(first.split()) <= set(sidt.__all__)
    assert callable(sidt.search) and callable(sidt.allocate)


def test_forwards_are_imported_when_a_model_is_sliced_and_only_its_own():
    program = """if True:
        import sys, timm, sidt.surgery.slicing, sidt.space.space
        assert "sidt.surgery.attention" not in sys.modules
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
        space = sidt.space.space_for(model)
        sidt.surgery.slice_model(model, sidt.DimensionPlan(space, {"heads.0": [1]}))
        assert "sidt.surgery.attention" in sys.modules
        assert not {"sidt.detection", "mmdet", "mmcv", "mmengine"} & set(sys.modules)
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_check_sees_what_it_should():
    source = "from sidt.space import axes\nimport sidt.space.plan\ndef f():\n    from sidt.cli.commands import main\n"
    assert inside(source) == {"sidt.space.axes", "sidt.space.plan", "sidt.cli.commands"}
    assert inside("from sidt import search") == inside("import sidt") == {"sidt"}
    assert floor("sidt.space.plan") < floor("sidt.runs.folder") < floor("sidt.detection.data.digits")
    assert floor("sidt.detection.runs.demo") < floor("sidt.cli.detect") and floor("sidt.nowhere.new") == -1


DIGITS = ROOT / "configs" / "classification" / "digits_vit.yaml"
HEAVY = ("torch", "timm", "optuna", "sklearn", "scipy", "pandas", "matplotlib", "accelerate", "pydantic")


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (None, ()),
        ("", ()),
        ("--help", ()),
        ("search --help", ()),
        ("--version", ()),
        ("spaces", ()),
        ("spaces pvt_v2_b0", ("torch", "timm", "pydantic")),
        ("complexity pvt_v2_b0 --format md", ("torch", "timm", "pydantic")),
        (
            f"complexity {DIGITS}",
            ("torch", "timm", "optuna", "accelerate", "pydantic"),
        ),  # what its config is checked by
    ],
)
def test_heavy_packages_wait_until_they_are_needed(words, needs):
    """``None`` only imports sidt; the others are command lines."""
    program = "import sidt" if words is None else f"import sidt.cli\nsys.argv[1:] = {words.split()}\nsidt.cli.main()"
    heavy = f"[m for m in {HEAVY} if m in sys.modules]"
    check = f"import sys, atexit\natexit.register(lambda: print({heavy}, file=sys.stderr))\n{program}"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1:] == [str(list(needs))], result.stderr
