"""A catalogue on disk: `catalogue.json` and one .npy file per array.

All ranks of a node map the arrays instead of copying them. Trie and gain take about 30 bytes per
trie node, the arrays over tokens 9 bytes per token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.folders import is_free, new_folder, read_json_object, sha256_of, write_json
from igd_ds.items.catalogue import Catalogue, ItemDataset
from igd_ds.items.decisiveness import INFORMATION_GAIN, check_names, gain_deciles, zero_gain
from igd_ds.items.trie import TokenTrie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
"""Version 1 has no `zero_gain`, no `token_node` and no `decisiveness`; it can still be read."""

CATALOGUE_ARRAYS = ("token_ids", "offsets", "counts")
# The trie's item_count is the catalogue's counts, which are stored once.
TRIE_ARRAYS = tuple(field.name for field in fields(TokenTrie) if field.name != "item_count")
TOKEN_ARRAYS = ("zero_gain", "token_node")
SETTINGS = ("eos_token_id", "kind", "tokenizer_fingerprint", "dataset_fingerprint")


@dataclass(frozen=True)
class StoredCatalogue:
    """A catalogue of T tokens, its trie of M nodes, and how decisive each edge and token is.

    Example:
        >>> gain = edge_gain(trie, "information-gain", "prior")
        >>> stored = StoredCatalogue.build(catalogue, trie, gain, "prior")
        >>> save_catalogue(run / "catalogue", stored)
        >>> weights = np.where(stored.zero_gain, 0.1, 1.0)  # one per catalogue token
    """

    catalogue: Catalogue
    """Token paths and training counts."""
    trie: TokenTrie
    """The trie of the paths."""
    gain: np.ndarray
    """float32 (M,): the measure `decisiveness` of every edge; information gain is in nats."""
    zero_gain: np.ndarray
    """bool (T,): whether the catalogue token has zero information gain (see
    decisiveness.zero_gain). This is decided on training counts, whatever the measure in `gain`
    is."""
    token_node: np.ndarray
    """int32 (T,): the trie node that the catalogue token leads to."""
    entropy: str
    """The entropy behind the information gain, a name in ENTROPIES."""
    decisiveness: str = INFORMATION_GAIN
    """The measure in `gain`, a name in MEASURES."""

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        trie: TokenTrie,
        gain: np.ndarray,
        entropy: str,
        decisiveness: str = INFORMATION_GAIN,
    ) -> StoredCatalogue:
        """Look up each catalogue token's node and zero-gain flag, and return everything together.

        Args:
            catalogue: token paths and training counts.
            trie: built from them.
            gain: `edge_gain(trie, decisiveness, entropy)`, floats (M,). It is kept as float32.
            entropy: a name in ENTROPIES.
            decisiveness: a name in MEASURES.

        Raises:
            UsageError: unknown `entropy` or `decisiveness`.
        """
        check_names(decisiveness, entropy)
        gain32 = np.asarray(gain, np.float32)
        # Information gain is 0 on the edges of `zero_gain` and on no others with training targets.
        # float32 must keep that. A value of 0 in another measure has no such meaning.
        assert decisiveness != INFORMATION_GAIN or np.array_equal(gain32 == 0, gain == 0), (
            "an information gain underflowed to zero, which only a zero-gain token may have"
        )

        token_node = trie.path_nodes(catalogue.offsets)
        return cls(
            catalogue=catalogue,
            trie=trie,
            gain=gain32,
            zero_gain=zero_gain(trie)[token_node],
            token_node=token_node,
            entropy=entropy,
            decisiveness=decisiveness,
        )

    @functools.cached_property
    def gain_deciles(self) -> np.ndarray:
        """float32 (9,): borders of the deciles of `gain`, see `decisiveness.gain_deciles`."""
        return gain_deciles(self.trie, self.gain)


def save_catalogue(folder: Path | str, stored: StoredCatalogue) -> None:
    """Write a catalogue to a new folder. The folder appears when it is complete.

    Raises:
        UsageError: the folder exists.
    """
    folder = Path(folder)
    if not is_free(folder):
        raise UsageError(
            f"{folder} exists: a catalogue is never overwritten, remove it or name another folder"
        )

    arrays = {name: getattr(stored.catalogue, name) for name in CATALOGUE_ARRAYS}
    arrays |= {name: getattr(stored.trie, name) for name in TRIE_ARRAYS}
    arrays |= {"gain": stored.gain} | {name: getattr(stored, name) for name in TOKEN_ARRAYS}
    description = {
        "version": VERSION,
        "entropy": stored.entropy,
        "decisiveness": stored.decisiveness,
        "num_items": stored.catalogue.num_items,
        "num_nodes": stored.trie.num_nodes,
        **{name: getattr(stored.catalogue, name) for name in SETTINGS},
    }

    with new_folder(folder) as unfinished:
        sizes, hashes = {}, {}
        for name, array in arrays.items():
            path = unfinished / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            sizes[name], hashes[name] = path.stat().st_size, sha256_of(path)
        files = {"bytes": sizes, "sha256": hashes}
        write_json(unfinished / "catalogue.json", description | files)


def load_catalogue(
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dataset: ItemDataset | None = None,
) -> StoredCatalogue:
    """Map a stored catalogue read-only, after a check of every array's sha256 (1 s per GB).

    Args:
        folder: a folder that `save_catalogue` wrote, in this version or the one before.
        tokenizer: if given, the tokenizer with which the catalogue must have been made.
        dataset: if given, the dataset from which the catalogue must have been made.

    Raises:
        UsageError: the folder is no catalogue or has another version; a file is missing, cut off or
            changed; or tokenizer or dataset is another one.
    """
    folder = Path(folder)
    description = _read_description(folder)
    if dataset is not None and description["dataset_fingerprint"] != dataset.fingerprint:
        raise UsageError(
            f"the catalogue in {folder} belongs to another dataset: give the dataset it was made "
            "from, or build it anew"
        )

    arrays = {name: _map_array(folder, name, description) for name in description["bytes"]}
    catalogue = Catalogue(
        token_ids=arrays["token_ids"],
        offsets=arrays["offsets"],
        counts=arrays["counts"],
        **{name: description[name] for name in SETTINGS},
    )
    if tokenizer is not None:
        try:
            catalogue.check_tokenizer(tokenizer, dataset)
        except UsageError as error:
            raise UsageError(f"{folder}: {error}") from error
    trie = TokenTrie(**{name: arrays[name] for name in TRIE_ARRAYS}, item_count=catalogue.counts)
    if "sha256" not in description:
        _check_links(folder, trie)
    if description["version"] == 1:
        return StoredCatalogue.build(catalogue, trie, arrays["gain"], description["entropy"])
    return StoredCatalogue(
        catalogue=catalogue,
        trie=trie,
        gain=arrays["gain"],
        zero_gain=arrays["zero_gain"],
        token_node=arrays["token_node"],
        entropy=description["entropy"],
        decisiveness=description["decisiveness"],
    )


def _read_description(folder: Path) -> dict[str, Any]:
    """Return the content of catalogue.json, checked to be of a version that can be read."""
    path = folder / "catalogue.json"
    if not path.exists():
        raise UsageError(f"no catalogue in {folder}: catalogue.json is missing")
    description = read_json_object(path, "build the catalogue anew")
    version = description.get("version")
    if version not in (1, VERSION):
        raise UsageError(
            f"{path} has version {version}, but this program reads 1 and {VERSION}: build the "
            "catalogue anew"
        )
    return description


def _map_array(folder: Path, name: str, description: dict[str, Any]) -> np.ndarray:
    """Return a read-only memory map of one array, after a check of the file's size and content.

    Catalogues saved by earlier versions name no sha256, so only the size is checked.
    """
    path = folder / f"{name}.npy"
    expected = description["bytes"][name]
    if not path.exists():
        raise UsageError(f"{path} is missing; build the catalogue anew")

    found = path.stat().st_size
    if found != expected:
        raise UsageError(
            f"{path} has {found:,} bytes instead of {expected:,}: it is cut off or damaged; build "
            "the catalogue anew"
        )
    sha256 = description.get("sha256", {}).get(name)
    if sha256 is not None and sha256_of(path) != sha256:
        raise UsageError(
            f"{path} is not the file that was saved (its sha256 differs): it is damaged or was "
            "changed; restore it, or build the catalogue anew"
        )
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _check_links(folder: Path, trie: TokenTrie) -> None:
    """Raise UsageError where the links of a trie without checksums contradict each other.

    A search could then walk in a circle.
    """
    begin = trie.child_begin.astype(np.int64)
    nodes = np.arange(trie.num_nodes)
    is_ordered = begin[0] == 1 and begin[-1] == len(nodes) and bool(np.all(np.diff(begin) >= 0))
    if (
        not is_ordered
        or not np.array_equal(np.repeat(nodes, np.diff(begin)), trie.parent[1:])
        or not np.all(trie.parent[1:] < nodes[1:])
    ):
        raise UsageError(
            f"{folder}: parent.npy and child_begin.npy are not one tree: a file is damaged or was "
            "changed; restore it, or build the catalogue anew"
        )
