"""Items that share one token path: how many, which, and whether the tokenizer merged them.

A model cannot tell the items of one path apart. Some of this is in the data (two items with one
title). A path of many items, or of items with different titles, is a sign of something else: a
missing value that is spelled out, or a tokenizer that cannot write the titles.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igd_ds.items.catalogue import ItemDataset

MAX_ITEMS_PER_PATH = 5
"""A path with more items than these is reported. Assumed: so many volumes may share a title."""

NUM_EXAMPLES = 3
MAX_SHOWN = 40  # characters of a title in a message


@dataclass(frozen=True)
class SharedPaths:
    """The paths that a report should name, each as the ids of its items."""

    crowded: list[np.ndarray]
    """Paths with more than MAX_ITEMS_PER_PATH items, the largest first."""
    merged: list[np.ndarray]
    """Paths whose items have different texts."""
    texts: Sequence[str | None]
    """The text of each item: its title or semantic ID."""

    @classmethod
    def find(cls, path_of_item: np.ndarray, texts: Sequence[str | None]) -> SharedPaths:
        """Look at all items.

        Args:
            path_of_item: integers (N,): equal where items share a path, such as the trie's leaves.
            texts: N titles, or semantic IDs; None where an item has none.
        """
        order = np.argsort(path_of_item, kind="stable")
        borders = np.flatnonzero(np.diff(path_of_item[order])) + 1
        begins, ends = np.append(0, borders), np.append(borders, len(order))
        shared = np.flatnonzero(ends - begins > 1)
        groups = [order[begins[group] : ends[group]] for group in shared]

        crowded = [group for group in groups if len(group) > MAX_ITEMS_PER_PATH]
        crowded.sort(key=len, reverse=True)
        merged = [group for group in groups if len({texts[item] for item in group}) > 1]
        return cls(crowded, merged, texts)

    @classmethod
    def of_texts(cls, texts: Sequence[Hashable | None]) -> SharedPaths:
        """Return the paths as the texts alone tell them: items with equal texts share one."""
        items = [item for item, text in enumerate(texts) if text is not None]
        number: dict[Hashable, int] = {}
        paths = np.arange(-len(texts), 0)  # an item without a text shares no path
        paths[items] = [number.setdefault(texts[item], len(number)) for item in items]
        return cls.find(paths, [None if text is None else str(text) for text in texts])

    def warning(self, what: str = "token path") -> str:
        """Return one line that names numbers and examples, or "" if there is nothing to report.

        Args:
            what: the name of what is shared.
        """
        found = []
        if self.crowded:
            items, largest = sum(map(len, self.crowded)), self.crowded[0]
            found.append(
                f"{len(self.crowded):,} with more than {MAX_ITEMS_PER_PATH} items ({items:,} items "
                f"in all; the largest has {len(largest):,}: {self._examples(largest)}, …)"
            )
        if self.merged:
            found.append(
                f"{len(self.merged):,} with different texts (such as "
                f"{self._examples(self._different(self.merged[0]))})"
            )
        if not found:
            return ""
        return (
            f"warning: {what}s that items share: {' and '.join(found)}. The model cannot tell them "
            "apart. Item match, the headline, divides a hit among them; token match counts it in "
            "full"
        )

    def _different(self, items: np.ndarray) -> np.ndarray:
        """Return one item for each different text."""
        first = {self.texts[item]: item for item in items[::-1]}
        return np.sort(list(first.values()))

    def _examples(self, items: np.ndarray) -> str:
        return ", ".join(
            f"{item} {self.texts[item]!r:.{MAX_SHOWN}}" for item in items[:NUM_EXAMPLES]
        )

    def refuse_merged(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UsageError if the vocabulary of the tokenizer merged items with different texts.

        The vocabulary is the cause if the tokenizer's normaliser leaves the texts of one path
        different. Texts that the normaliser makes equal (upper and lower case, ① and 1) are merged
        on purpose.
        """
        lost = [
            group
            for group in self.merged
            if len({_normalised(self.texts[item] or "", tokenizer) for item in group}) > 1
        ]
        if lost:
            raise UsageError(
                f"the tokenizer cannot write the items: {sum(map(len, lost)):,} items with "
                f"different texts share {len(lost):,} token paths, such as "
                f"{self._examples(self._different(lost[0]))}: take a tokenizer with bytes (byte "
                "fallback) or one for this language, or accept it with --allow_merged_titles"
            )


def item_texts(dataset: ItemDataset, kind: str) -> list[str | None]:
    """Return what each item is written as: its title, or the codes of its semantic ID."""
    if kind == "text" or dataset.semantic_ids is None:
        return list(dataset.titles)
    return ["".join(codes) for codes in dataset.semantic_ids]


def _normalised(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text as the tokenizer's normaliser leaves it, with single spaces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return " ".join(text.split())
