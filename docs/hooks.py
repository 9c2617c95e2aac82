"""What mkdocs does beside the pages of docs/: one link for GitHub and the site, and the package as it is installed.

Pages outside of docs/ (OUTSIDE) are pages of the site too. Links are written as GitHub reads them, from the file where
they stand to another file of the repository, and are turned here into those of the site, whose root is docs/.
"""

import re
import shutil
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md")
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")
_ROLE = re.compile(r":(?:func|class|mod|meth|attr):<code>~?([\w.]+)</code>")


def on_startup(**_: Any) -> None:
    """Put detection/ inside of sidt, where mkdocstrings finds it; copies, since it follows no links."""
    for source, place in (("sidt", "sidt"), ("detection", "sidt/detection")):
        package = ROOT / "build" / "reference" / place
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / source, package, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of the repository into those of the site."""
    uri = page.file.src_uri
    place = dirname(uri if page.file.generated_by else f"docs/{uri}")

    def on_the_site(link: re.Match[str]) -> str:
        target = normpath(join(place, link[1]))
        target = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return relpath(target, dirname(uri) or ".")

    return _LINK.sub(on_the_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as Sphinx does; here they become links, where the reference has them."""
    return _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
