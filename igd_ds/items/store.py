"""A catalogue on disk: `catalogue.json` and one .npy per array, which all ranks of a node map instead of copying.

The structure and the chosen entropy's gain take about 30 bytes per trie node; other measures are made when asked for.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.catalogue import Catalogue, tokenizer_fingerprint
from igd_ds.items.decisiveness import ENTROPIES, gain_deciles
from igd_ds.items.trie import TokenTrie

VERSION = 1
CATALOGUE_ARRAYS = ("token_ids", "offsets", "counts")
# item_count is the catalogue's counts: written once.
TRIE_ARRAYS = tuple(field.name for field in fields(TokenTrie) if field.name != "item_count")
SETTINGS = ("eos_token_id", "kind", "tokenizer_fingerprint", "dataset_fingerprint")


@dataclass(frozen=True)
class StoredCatalogue:
    """A catalogue, its trie, and the information gain of every edge: `gain` float32 (M,), in nats, from `entropy`."""

    catalogue: Catalogue
    trie: TokenTrie
    gain: np.ndarray
    entropy: str

    @functools.cached_property
    def gain_deciles(self) -> np.ndarray:
        """Borders of the deciles of non-zero gains, float32 (9,), see `decisiveness.gain_deciles`; found once per process."""
        return gain_deciles(self.trie, self.gain)


def save_catalogue(
    folder, catalogue: Catalogue, trie: TokenTrie, gain: np.ndarray, entropy_name: str
) -> None:
    """Write a new folder, whole or not at all. `gain` (M,) is stored as float32; what is not 0 stays so.

    Raises:
        ValueError: the folder exists; unknown entropy.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(
            f"{folder} exists: a catalogue is never overwritten, remove it or name another folder"
        )
    if entropy_name not in ENTROPIES:
        raise UsageError(f"unknown entropy {entropy_name!r}; known: {', '.join(ENTROPIES)}")
    gain32 = np.asarray(gain, np.float32)
    assert np.array_equal(gain32 == 0, gain == 0), (
        "a gain underflowed to zero, which would make it a zero-IG token"
    )
    arrays = {name: getattr(catalogue, name) for name in CATALOGUE_ARRAYS}
    arrays |= {name: getattr(trie, name) for name in TRIE_ARRAYS} | {"gain": gain32}
    description = {"version": VERSION, "entropy": entropy_name, "num_items": catalogue.num_items}
    description |= {"num_nodes": trie.num_nodes} | {
        name: getattr(catalogue, name) for name in SETTINGS
    }
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        sizes = {}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            sizes[name] = (temporary / f"{name}.npy").stat().st_size
        text = json.dumps(description | {"bytes": sizes}, indent=2) + "\n"
        (temporary / "catalogue.json").write_text(text, encoding="utf-8")
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_catalogue(folder, tokenizer=None, dataset=None) -> StoredCatalogue:
    """Map a stored catalogue read-only. Given a tokenizer or a dataset, check that it was made from them.

    Raises:
        ValueError: not a catalogue, another version, a file missing or cut off, another tokenizer or dataset.
    """
    folder = Path(folder)
    description = _read_description(folder)
    if tokenizer is not None and description["tokenizer_fingerprint"] != tokenizer_fingerprint(
        tokenizer
    ):
        raise UsageError(
            f"the catalogue in {folder} was made with another tokenizer, its token ids mean something else here: "
            "give the tokenizer it was made with, or build the catalogue anew"
        )
    if dataset is not None and description["dataset_fingerprint"] != dataset.fingerprint:
        raise UsageError(
            f"the catalogue in {folder} belongs to another dataset: give the dataset it was made from, or build it anew"
        )
    arrays = {
        name: _map_array(folder, name, description)
        for name in (*CATALOGUE_ARRAYS, *TRIE_ARRAYS, "gain")
    }
    catalogue = Catalogue(
        **{name: arrays[name] for name in CATALOGUE_ARRAYS},
        **{name: description[name] for name in SETTINGS},
    )
    trie = TokenTrie(**{name: arrays[name] for name in TRIE_ARRAYS}, item_count=catalogue.counts)
    return StoredCatalogue(catalogue, trie, arrays["gain"], description["entropy"])


def _read_description(folder: Path) -> dict:
    path = folder / "catalogue.json"
    if not path.exists():
        raise UsageError(f"no catalogue in {folder}: catalogue.json is missing")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): build the catalogue anew") from None
    if description.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {description.get('version')}, this program reads {VERSION}: build it anew"
        )
    return description


def _map_array(folder: Path, name: str, description: dict) -> np.ndarray:
    path, expected = folder / f"{name}.npy", description["bytes"][name]
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        what = (
            "is missing"
            if found is None
            else f"has {found:,} bytes, expected {expected:,}: it is cut off or damaged"
        )
        raise UsageError(f"{path} {what}; build the catalogue anew")
    return np.load(path, mmap_mode="r", allow_pickle=False)
