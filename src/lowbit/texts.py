"""The texts that come with lowbit, for where the user gives none."""

from __future__ import annotations

import lzma
from importlib import resources

# Text in the public domain: file, what it is, its terms; see data/SOURCES.md.
BUNDLED = (
    ("austen.txt.xz", "Jane Austen, Persuasion (1818) and Northanger Abbey (1803)", "public domain"),
    ("sqlite-docs.txt.xz", "SQLite documentation, prose of 86 pages (3.40)", "public domain"),
)


def bundled() -> list[str]:
    """The whole texts, in the order of ``BUNDLED``."""
    folder = resources.files("lowbit").joinpath("data")
    return [lzma.decompress(folder.joinpath(name).read_bytes()).decode("utf-8") for name, _, _ in BUNDLED]
