"""The code blocks of the README and of the pages of the site, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from test_imports import ROOT

PAGES = tuple(
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```" in path.read_text(encoding="utf-8")
)
_NOTE = re.compile(r"<!-- (slow|not run)(?:: (.+?))? -->")
_FILE = re.compile(r"# ([\w/]+\.\w+)\n")  # a block whose first line names a file is that file
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+")  # RUN, DIR, OWNER/NAME, runs/NAME
_UV = re.compile(r"^\.uv/bin/uv run (--(extra|group) \w+ )*")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: the file that it is in.
        line: its first line there.
        language: what stands behind the fence.
        text: its lines.
        note: of the comment ``<!-- slow -->`` or ``<!-- not run: why -->`` before it.
    """

    page: Path
    line: int
    language: str
    text: str
    note: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line says so."""
        named = _FILE.match(self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of the commands of ``sidt`` in it, without the program."""
        return [words for line in self.lines if (words := sidt_words(line)) is not None]

    @property
    def lines(self) -> list[str]:
        """The commands of a shell block, one by one."""
        if self.language != "sh":
            return []
        joined = self.text.replace("\\\n", " ")
        return [part.strip() for line in joined.splitlines() for part in line.split(" && ") if part.strip()]


def sidt_words(line: str) -> list[str] | None:
    """The words behind ``sidt`` of a command, if it is one of ``sidt``."""
    words = shlex.split(_UV.sub("", line), comments=True)
    for start in (["sidt"], ["python", "-m", "sidt"]):
        if words[: len(start)] == start:
            return words[len(start) :]
    return None


def has_placeholder(line: str) -> bool:
    """Whether a command stands for many: a word of it is to be replaced."""
    values = [part for word in shlex.split(line, comments=True) for part in re.split(r"[=,:@/]", word)]
    return any(_PLACEHOLDER.fullmatch(value) for value in values)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found, note = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            said = _NOTE.search(token.content)
            note = said[1] if said else note
        elif token.type == "fence":
            assert token.map is not None
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, note))
            note = ""
    return found
