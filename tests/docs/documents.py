"""The documents as the tests see them: their fenced blocks, headings and tables."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README, CHINESE, GUIDE = (ROOT / name for name in ("README.md", "README_CN.md", "MIGRATION_GUIDE.md"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [README, CHINESE, GUIDE, *PAGES]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block: what stands behind the fence, and the text."""

    info: str
    text: str

    @property
    def language(self) -> str:
        """The first word behind the fence."""
        return self.info.split(" ")[0]

    @property
    def is_output(self) -> bool:
        """Whether the block is what the code before it prints."""
        return self.info.endswith('title="prints"')


def name_of(path: Path) -> str:
    """The path as a reader of a failure wants it."""
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    """Every fenced block, in order."""
    return [Block(*found) for found in FENCE.findall(path.read_text(encoding="utf-8"))]


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))
