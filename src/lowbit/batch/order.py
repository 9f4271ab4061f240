"""In which order leased items are asked: those that begin alike together, and of those the long ones first.

Within a window alone: a file of any size is never in memory, and the first items of a file are done before its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lowbit.batch.items import Item
from lowbit.batch.prefixes import WORTH, common, text_of

WINDOW = 8  # items for each request under way
LARGEST = 8 << 20  # bytes of a window's requests in IN
_T = TypeVar("_T")


def arranged(found: Sequence[tuple[_T, Item]]) -> list[tuple[_T, Item]]:
    """A window's items, each with what belongs to it, in the order in which to ask them; ``shared`` is set in them.

    Groups of common beginnings stay in the order of their first items. Within one the longest come first: the requests
    that are under way together are of like length, and no long one is left to the end.
    """
    texts = [text_of(item.body) for _, item in found]
    places = sorted(range(len(found)), key=lambda i: texts[i])
    groups: list[list[int]] = []
    for i in places:
        if groups and common(texts[groups[-1][-1]], texts[i]) >= WORTH:
            groups[-1].append(i)
        else:
            groups.append([i])
    lone = [group[0] for group in groups if len(group) == 1]
    together = [group for group in groups if len(group) > 1] + ([lone] if lone else [])
    together.sort(key=min)
    ordered = [i for group in together for i in sorted(group, key=lambda i: (-len(texts[i]), i))]
    alone = set(lone)
    return [(found[i][0], replace(found[i][1], shared=i not in alone)) for i in ordered]
