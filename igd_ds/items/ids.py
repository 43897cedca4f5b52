"""The two names of an item: the source's id, and our dense number.

A source names its items by ids of its own: an ASIN, a row of its table. `igd prepare` numbers the
items that it keeps anew, 0 … N − 1, and items.parquet has both names of each. Item 0 may be the
source's item 2850. Outside of the toolkit, where both are plain numbers, a mix-up goes unnoticed.
So everything that comes from outside speaks source ids, unless dense ids are asked for by name.

Letters in shapes: N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from igd_ds.errors import UsageError
from igd_ds.folders import read_parquet

SOURCE, DENSE = "source", "dense"
SPACES = (SOURCE, DENSE)
"""Names of the two languages of ids, as options take them."""

ItemId = str | int
"""An item's name outside of the toolkit; the integer 2850 and the text "2850" are the same id."""


@dataclass(frozen=True)
class ItemIds:
    """The source ids of a dataset's items.

    Example:
        >>> ids = ItemIds.read("DATASET")
        >>> ids.source_ids[:2]
        ['2850', '17']
        >>> ids.item_ids([17, "2850"], "my list")
        array([1, 0])
        >>> ids.item_ids([1, 0], "my list", "dense")
        array([1, 0])
    """

    column: pa.Array
    """String array (N,): the source id of each item."""

    @classmethod
    def read(cls, dataset: str | Path) -> ItemIds:
        """Read the ids of a dataset folder."""
        return cls.of(read_parquet(Path(dataset) / "items.parquet", columns=["source_id"]))

    @classmethod
    def of(cls, items: pa.Table) -> ItemIds:
        """Take the ids from the table of items.parquet."""
        return cls(items["source_id"].cast(pa.string()).combine_chunks())

    @classmethod
    def numbered(cls, num_items: int) -> ItemIds:
        """Return the ids of a source whose numbers the dataset has kept: "0", "1", "2" …."""
        return cls(pa.array(np.arange(num_items)).cast(pa.string()))

    def __len__(self) -> int:
        """Return the number of items, N."""
        return len(self.column)

    @cached_property
    def source_ids(self) -> list[str]:
        """The source id of each item."""
        ids: list[str] = self.column.to_pylist()
        return ids

    @cached_property
    def in_dense_order(self) -> bool:
        """Whether the source ids are "0", "1", "2" … in order, so that both languages are one."""
        return bool(self.column.equals(ItemIds.numbered(len(self)).column))

    @cached_property
    def _item_of(self) -> dict[str, int]:
        """Source id → item id, made once."""
        item_of = {name: item for item, name in enumerate(self.source_ids)}
        if len(item_of) < len(self):
            first = next(i for i, name in enumerate(self.source_ids) if item_of[name] != i)
            name = self.source_ids[first]
            raise UsageError(
                f"items.parquet: items {first} and {item_of[name]} have the same source_id "
                f"{name!r}, so source ids do not name items: prepare the dataset again"
            )
        return item_of

    def item_ids(
        self,
        ids: Iterable[ItemId] | np.ndarray,
        what: str,
        space: str = SOURCE,
        switch: str = "ids='{}'",
    ) -> np.ndarray:
        """Return the item ids, int64, that a flat list of ids names, in its order.

        Args:
            ids: texts and whole numbers, Python's or numpy's.
            what: how error messages call the list, such as "histories[3]".
            space: which language `ids` speaks, a name in SPACES.
            switch: how a user chooses the language, {} stands for its name; for error messages.

        Raises:
            UsageError: it is no flat list of ids, or an id names no item; the message says whether
                it names one in the other language.
        """
        listed = _flat(ids, what)
        if isinstance(listed, np.ndarray) and (space == DENSE or self.in_dense_order):
            unknown = listed[(listed < 0) | (listed >= len(self))]
            if unknown.size:
                raise UsageError(f"{what}: {self._unknown(unknown[0], space, switch)}")
            return listed.astype(np.int64)

        found = np.empty(len(listed), np.int64)
        entries = listed.tolist() if isinstance(listed, np.ndarray) else listed
        for place, entry in enumerate(entries):
            item = self.item(str(entry), space)
            if item is None:
                raise UsageError(f"{what}: {self._unknown(entry, space, switch)}")
            found[place] = item
        return found

    def item(self, name: str, space: str) -> int | None:
        """Return the item that `name` names in a language, or None."""
        if space == SOURCE:
            return self._item_of.get(name)
        is_number = name.isascii() and name.isdigit() and len(name) < 19
        item = int(name) if is_number else len(self)
        return item if item < len(self) and str(item) == name else None

    def _unknown(self, entry: Any, space: str, switch: str) -> str:
        """Return what is wrong with an id that names no item in `space`."""
        name = str(entry)
        if space == SOURCE:
            what, other = "source id of this dataset", "dense item id"
            instead, there = DENSE, self.item(name, DENSE) is not None
        else:
            what, other = f"dense item id (0 to {len(self) - 1})", "source id"
            instead, there = SOURCE, self.item(name, SOURCE) is not None

        if space == SOURCE:
            what += self._with_zeros(name)
        if there:
            meant = f"it is a {other}: choose {switch.format(instead)} if that is meant"
            return f"{name!r} is no {what}; {meant}"
        return f"{name!r} is no {what}, and no {other} either; source ids look like {self._sample}"

    def _with_zeros(self, name: str) -> str:
        """Return a hint at a source id that differs from `name` in leading zeros alone, or ""."""
        bare = name.lstrip("0")
        alike = [own for own in self.source_ids if own.lstrip("0") == bare] if bare else []
        return f" ({alike[0]!r} is one, with its zeros)" if alike else ""

    @property
    def _sample(self) -> str:
        """A few source ids, for error messages."""
        return ", ".join(repr(name) for name in self.source_ids[:3])

    def places_in(
        self, ids: Sequence[str], count: int, what: str, entry: str = "row", space: str = SOURCE
    ) -> np.ndarray:
        """Return which row (or column) of an array belongs to each item, int64 (N,).

        Rows whose id is not in the dataset are ignored.

        Args:
            ids: the id of each row.
            count: rows of the array.
            what: how error messages call the ids, such as "--item_ids FILE.npy".
            entry: what an id belongs to, "row" or "column".
            space: which language `ids` speaks.

        Raises:
            UsageError: there are more or fewer ids than rows, an id is repeated, or an item has no
                row.
        """
        if len(ids) != count:
            raise UsageError(
                f"{what}: {len(ids)} ids for {count} {entry}s; need one each, in the same order"
            )

        place_of = {name: place for place, name in enumerate(ids)}
        if len(place_of) != len(ids):
            twice = next(name for place, name in enumerate(ids) if place_of[name] != place)
            raise UsageError(
                f"{what}: id {twice!r} stands there more than once ({len(ids) - len(place_of)} "
                "repeated ids)"
            )

        wanted = self.source_ids if space == SOURCE else [str(item) for item in range(len(self))]
        missing = [name for name in wanted if name not in place_of]
        if missing:
            raise UsageError(
                f"{what}: no {entry} for item {wanted.index(missing[0])} ({space} id "
                f"{missing[0]!r}; {len(missing)} of {len(wanted)} items lack one); the ids must be "
                + ("the dataset's source_id" if space == SOURCE else "dense item ids")
            )
        return np.array([place_of[name] for name in wanted], np.int64)

    def refuse_unnamed(self, what: str, entry: str, remedy: str) -> None:
        """Refuse an array whose order nothing names, unless source and dense order are the same.

        Args:
            what: how the error message calls the array.
            entry: what there is one of per item, "row" or "column".
            remedy: how the user can name the order.

        Raises:
            UsageError: the source has other ids or another order.
        """
        if self.in_dense_order:
            return
        item = next(i for i, name in enumerate(self.source_ids) if name != str(i))
        raise UsageError(
            f"{what}: nothing says whose order its {entry}s are in, and item {item} of this "
            f"dataset is the source's {self.source_ids[item]!r}; {remedy}"
        )


def names_of(ids: Iterable[ItemId] | np.ndarray, what: str) -> list[str]:
    """Return a flat list of ids as texts.

    Args:
        ids: texts and whole numbers.
        what: how error messages call the list.

    Raises:
        UsageError: it is no flat list of texts and whole numbers.
    """
    listed = _flat(ids, what)
    entries = listed.tolist() if isinstance(listed, np.ndarray) else listed
    return [str(entry) for entry in entries]


def _flat(ids: Any, what: str) -> np.ndarray | list[ItemId]:
    """Return an array of whole numbers as it is, anything else as a list of texts and numbers."""
    wrong = f"{what}: need a flat list of item ids, texts or whole numbers; found "
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        return ids
    if isinstance(ids, str | bytes) or not (hasattr(ids, "tolist") or isinstance(ids, Iterable)):
        raise UsageError(f"{wrong}{ids!r:.80}")

    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not isinstance(listed, list):  # an array without dimensions
        raise UsageError(f"{wrong}{ids!r:.80}")
    for entry in listed:
        if not isinstance(entry, str | int | np.integer) or isinstance(entry, bool):
            raise UsageError(f"{wrong}{entry!r:.80}")
    return listed
