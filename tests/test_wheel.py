"""The wheel: built, unpacked, and imported in an empty folder, module by module."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_imports import ROOT, SOURCES

PARTS = ("sidt", "search_spaces", "detection", "configs")
HUGGING_FACE = "sidt.surgery.forwards.transformers_"  # import the extra transformers
WALK = """if True:
    import importlib, importlib.util, json, pkgutil, sys
    sys.path.insert(0, sys.argv[1])
    import sidt, sidt.detection
    found = {}
    left = ["sidt.configs."] if importlib.util.find_spec("transformers") else ["sidt.configs.", sys.argv[2]]
    for module in pkgutil.walk_packages(sidt.__path__, "sidt."):
        if not module.name.startswith(tuple(left)) and not module.name.endswith(("__main__", "detection.run")):
            found[module.name] = importlib.import_module(module.name).__file__
    json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel installs; built from a copy, since setuptools builds beside the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out / "site")
    return out / "site"


@pytest.mark.slow
def test_every_module_of_the_wheel_imports_in_an_empty_folder(site, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WALK, str(site), HUGGING_FACE]
    walked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert walked.returncode == 0, walked.stderr
    files = json.loads(walked.stdout.splitlines()[-1])
    expected = {name for name in SOURCES if name not in ("sidt", "sidt.__main__", "sidt.detection.run")}
    if find_spec("transformers") is None:  # which needs Python 3.11
        expected = {name for name in expected if not name.startswith(HUGGING_FACE)}
    assert set(files) == expected | {"sidt.search_spaces", "sidt.configs"}
    assert all(Path(file).is_relative_to(site) for file in files.values()), "from the wheel, and not from the sources"


def test_the_wheel_has_every_file_and_nothing_beside_sidt(site):
    places = {"sidt": "sidt", **{name: f"sidt/{name}" for name in PARTS[1:]}}
    for folder, place in places.items():
        own = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        missing = {p for p in own if "__pycache__" not in p.parts and not (site / place / p).is_file()}
        assert not missing
    assert {p.name.split("-")[0] for p in site.iterdir()} == {"sidt"}
