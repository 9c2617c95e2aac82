"""The site: mkdocs builds it without a warning, and the reference has all that is public."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from test_imports import ROOT

FACES = sorted(path for folder in ("sidt", "detection") for path in (ROOT / folder).rglob("__init__.pyi"))
INSIDE = {"cli", "drafting", "report", "runs"}  # what the command line is made of
PAGES = ("docs", "benchmarks/results", "sidt", "detection", "mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md")


def test_the_reference_has_every_public_name():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    said = {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)}
    public = set()
    for face in FACES:
        folder = face.parent.relative_to(ROOT).parts
        package = ".".join(folder if folder[0] == "sidt" else ("sidt", *folder))
        if folder[-1] in INSIDE and folder[0] == "sidt":
            continue
        beside = r"\.\S+" if package == "sidt" else r"\.\S*"  # the folders of sidt have pages of their own
        names = re.findall(rf"^from {beside} import (\w+) as", face.read_text(encoding="utf-8"), re.M)
        public |= {f"{package}.{name}" for name in names}
    assert said - public == set(), "there is no such name"
    assert public - said == set(), "no page of docs/reference has it"


@pytest.mark.slow
def test_mkdocs_builds_it_strictly(tmp_path):
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed; uv sync --group site")
    for name in PAGES:  # a copy, since the build puts a copy of the package beside the pages
        source, place = ROOT / name, tmp_path / name
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="sidt.shrink"' in reference and ":func:" not in reference
    assert (tmp_path / "site" / "benchmarks" / "results" / "width" / "index.html").is_file()
