"""Items as a model reads them: tokens with gains and siblings, and which items share prefixes.

`igd show` prints what these functions return. Everything is JSON values, except `CatalogueView`
itself.

Letters in shapes: N items, M trie nodes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.catalogue import Catalogue, ItemDataset
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.ids import DENSE, SOURCE, ItemIds
from igd_ds.items.ragged import index_within
from igd_ds.items.trie import TokenTrie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TRAINED = 3
"""How many siblings of a token, and how many items that branch off at a token, are listed."""


@dataclass(frozen=True)
class CatalogueView:
    """A catalogue with everything needed to describe its items.

    Example:
        >>> view = CatalogueView.build(dataset, tokenizer)
        >>> describe(view, find(view, "Super Mario")[0])["gain"]
        8.27
    """

    catalogue: Catalogue
    trie: TokenTrie
    gain: np.ndarray
    """float64 (M,), information gain in nats."""
    tokenizer: PreTrainedTokenizerBase
    names: list[list[str]]
    """N lists: an item's title, its semantic ID, or both."""
    ids: ItemIds
    """The source's ids of the items."""

    @classmethod
    def build(
        cls,
        dataset: ItemDataset,
        tokenizer: PreTrainedTokenizerBase,
        kind: str | None = None,
        entropy: str = "prior",
        ids: ItemIds | None = None,
    ) -> CatalogueView:
        """Tokenize a dataset's items as training does.

        Args:
            dataset: the items and the targets of the training rows.
            tokenizer: the model's tokenizer.
            kind: "text" or "semantic-id"; None takes the titles if the dataset has any.
            entropy: a name in ENTROPIES.
            ids: the source's ids of the items; None: their numbers.

        Raises:
            UsageError: see `Catalogue.build` and `information_gain`.
        """
        catalogue = Catalogue.build(dataset, tokenizer, kind)
        trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)

        codes: Sequence[Sequence[str]] = [[]] * dataset.num_items
        if catalogue.kind == "semantic-id" and dataset.semantic_ids is not None:
            codes = dataset.semantic_ids
        names = [
            [name for name in (title, "".join(path)) if name]
            for title, path in zip(dataset.titles, codes, strict=True)
        ]
        ids = ids or ItemIds.numbered(dataset.num_items)
        return cls(catalogue, trie, information_gain(trie, entropy), tokenizer, names, ids)

    def text(self, token: int) -> str:
        """Return a token's text, with a leading space and line breaks made visible.

        A token that is only a part of a character is returned as the tokenizer spells it.
        """
        text: str = self.tokenizer.decode([token])
        if "\ufffd" in text:
            text = self.tokenizer.convert_ids_to_tokens(int(token))
        return visible("␣" + text[1:] if text.startswith(" ") else text)

    def item(self, item: int) -> dict[str, Any]:
        """Return an item's dense id, source id, name and number of training rows."""
        return {
            "item": int(item),
            "source_id": self.ids.source_ids[item],
            "name": " ".join(self.names[item]),
            "train_count": int(self.catalogue.counts[item]),
        }

    def most_trained(self, items: np.ndarray) -> list[dict[str, Any]]:
        """Return `item` of at most MOST_TRAINED of the items, those trained most often first."""
        first = np.lexsort((items, -self.catalogue.counts[items]))[:MOST_TRAINED]
        return [self.item(item) for item in items[first]]

    def edge(self, node: int) -> dict[str, Any]:
        """Return the token on the edge into a node: text, gain, item and training counts."""
        token = self.trie.token[node]
        return {
            "token": int(token),
            "text": self.text(token),
            "gain": float(self.gain[node]),
            "items": int(self.trie.num_items[node]),
            "train_count": int(self.trie.train_count[node]),
        }

    def items_under(self, node: int) -> np.ndarray:
        """Return the ids of the items under a node."""
        first = self.trie.first_item[node]
        return self.trie.item_order[first : first + self.trie.num_items[node]]


def find(view: CatalogueView, wanted: str, space: str = SOURCE) -> list[int]:
    """Return the items that `wanted` names, those trained most often first.

    An item is named by its id or by its exact name. Only if there is none, parts of names count.
    Upper and lower case make no difference to names.

    Args:
        view: the catalogue.
        wanted: an id, a name or a part of one.
        space: the id space, a name in SPACES.

    Raises:
        UsageError: there is no such item; the message has the nearest names, and says whether the
            id exists in the other id space.
    """
    names, sought = view.names, wanted.strip().casefold()
    by_id = view.ids.item(wanted.strip(), space)
    found = [
        item for item, own in enumerate(names) if item == by_id or sought in map(str.casefold, own)
    ]
    if not found and sought:
        found = [
            item for item, own in enumerate(names) if any(sought in name.casefold() for name in own)
        ]

    if not found:
        original = {name.casefold(): name for own in names for name in own}
        matches = difflib.get_close_matches(sought, original, cutoff=0.3)
        near = ", ".join(repr(original[name]) for name in matches)
        other = DENSE if space == SOURCE else SOURCE
        hint = f"; it is a {other} id: add --ids {other} if that is meant"
        raise UsageError(
            f"no item {wanted!r} among {len(names)}; nearest: {near or 'none'}"
            + ("" if view.ids.item(wanted.strip(), other) is None else hint)
        )
    return sorted(found, key=lambda item: (-view.catalogue.counts[item], item))


def describe(view: CatalogueView, item: int) -> dict[str, Any]:
    """Describe an item: its tokens, which of them decide, and which items share its prefixes.

    Returns:
        `CatalogueView.item` and

        - tokens: for each token `CatalogueView.edge` (items and train_count are those under the
          prefix that ends with it), its share of the item's total gain (None if that is 0),
          zero_gain (the token rules out no training row), forced (the prefix before it has no
          other continuation), and its siblings;
        - gain: the item's total gain in nats;
        - deciding: the number, from 1 on, of the last token that is not forced; None if all are;
        - forced_runs: [first, last] number of each chain of forced tokens;
        - parting: the prefixes after which other items branch off, the longest first;
        - same_path: other items with the same tokens.
    """
    trie = view.trie
    nodes = _path(trie, item)
    gain, total = view.gain[nodes], float(view.gain[nodes].sum())

    tokens: list[dict[str, Any]] = []
    parting: list[dict[str, Any]] = []
    for number, node in enumerate(nodes):
        parent = int(trie.parent[node])
        siblings = np.arange(trie.child_begin[parent], trie.child_begin[parent + 1])
        siblings = np.setdiff1d(siblings, [node])
        trained = trie.train_count[siblings].astype(np.int64)
        first = siblings[np.lexsort((siblings, -trained))][:MOST_TRAINED]
        tokens.append(
            view.edge(node)
            | {
                "share": float(gain[number] / total) if total else None,
                "zero_gain": bool(trie.train_count[node] == trie.train_count[parent]),
                "forced": len(siblings) == 0,
                "siblings": len(siblings),
                "most_trained_siblings": [view.edge(sibling) for sibling in first],
            }
        )

        if number and len(siblings):
            others = np.setdiff1d(view.items_under(parent), view.items_under(node))
            part = {
                "tokens": number,
                "items": len(others),
                "most_trained": view.most_trained(others),
            }
            parting.insert(0, part)

    forced = [token["forced"] for token in tokens]
    not_forced = [number for number, is_forced in enumerate(forced, 1) if not is_forced]
    same_path = np.setdiff1d(view.items_under(nodes[-1]), [item])
    return view.item(item) | {
        "tokens": tokens,
        "gain": total,
        "deciding": max(not_forced, default=None),
        "forced_runs": _stretches(forced),
        "parting": parting,
        "same_path": {"items": len(same_path), "most_trained": view.most_trained(same_path)},
    }


def _path(trie: TokenTrie, item: int) -> list[int]:
    """Return the nodes of an item's path, without the root."""
    nodes: list[int] = []
    node = int(trie.leaf_of_item[item])
    while node:
        nodes.append(node)
        node = int(trie.parent[node])
    return nodes[::-1]


def _stretches(flags: Iterable[bool]) -> list[list[int]]:
    """Return [first, last] of each stretch of true flags, counted from 1 on.

    Example:
        >>> _stretches([True, False, True, True])
        [[1, 1], [3, 4]]
    """
    borders = np.flatnonzero(np.diff([0, *flags, 0])).reshape(-1, 2)
    return [[int(begin) + 1, int(end)] for begin, end in borders]


def worst(view: CatalogueView, count: int) -> dict[str, Any]:
    """Return the items that are hardest to tell apart, `count` of each kind.

    Returns:
        - latest: the items whose deciding token comes last; of equals, those with the least gain
          first;
        - duplicate_paths: how many token paths belong to several items, and duplicates: their
          items, the largest groups first;
        - prefix_items: how many items are a prefix of other items, so that their deciding token is
          the one that ends them, and prefixes: the first of these items.
    """
    trie, offsets = view.trie, view.catalogue.offsets
    nodes, begin, length = trie.path_nodes(offsets), offsets[:-1], np.diff(offsets)

    # The number of each item's deciding token, from 1 on (0 if all tokens are forced), and its
    # gain.
    is_branch = np.diff(trie.child_begin) > 1
    decides = is_branch[trie.parent[nodes]]
    number = 1 + index_within(offsets)
    deciding = np.maximum.reduceat(np.where(decides, number, 0), begin)
    gain = view.gain[nodes[begin + np.maximum(deciding - 1, 0)]]
    latest = np.lexsort((gain, -deciding))

    # Leaves with several items.
    shared = np.flatnonzero(trie.is_leaf & (trie.num_items > 1))
    shared = shared[np.argsort(-trie.num_items[shared], kind="stable")]

    # A token that ends an item is one of the last two: a line break and EOS, or EOS alone.
    near_end = deciding[latest] >= np.maximum(length[latest] - 1, 1)
    prefixes = [item for item in latest[near_end] if _ends_there(view, item, deciding[item] - 1)]

    def entry(item: int) -> dict[str, Any]:
        return view.item(item) | {
            "deciding": int(deciding[item]),
            "tokens": int(length[item]),
            "gain": float(gain[item]),
        }

    return {
        "latest": [entry(item) for item in latest[:count]],
        "duplicate_paths": len(shared),
        "duplicates": [
            [view.item(item) for item in view.items_under(leaf)] for leaf in shared[:count]
        ],
        "prefix_items": len(prefixes),
        "prefixes": [entry(item) for item in prefixes[:count]],
    }


def _ends_there(view: CatalogueView, item: int, num_tokens: int) -> bool:
    """Whether an item's first tokens are its complete title or all its codes."""
    path = view.catalogue.path(item)
    if view.catalogue.kind == "semantic-id":
        return num_tokens == len(path) - 1
    text: str = view.tokenizer.decode(path[:num_tokens])
    return text == next(iter(view.names[item]), "")


def visible(text: str) -> str:
    """Return the text with line breaks as ⏎ and other control characters as escapes.

    Example:
        >>> visible("a\\nb\\t")
        'a⏎b\\\\t'
    """
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character.isprintable():
        return character
    return "⏎" if character == "\n" else repr(character)[1:-1]
