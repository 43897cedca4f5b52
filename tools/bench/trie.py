"""Benchmark: token trie, prior gain and zero flags from given token ids, against a plain dict-of-dicts trie.

    python tools/bench/trie.py [--quick]

Recipe: synthetic items of about 12 tokens in the manner of book titles (seed 0): Zipf tokens out of 151,936, half of the
items in series that share their first tokens, tails of their own, "\\n", EOS; Zipf training counts, one item in ten cold.
Every measurement runs in a process of its own, one thread; memory is the peak of the process over what it had with the
input loaded; time is the median of the runs. The plain trie is written below as one would write it: a node is a dict
from token to child that keeps its numbers under string keys. Both sides' outputs are compared array by array.
Tokenization is timed apart, through `Catalogue.build` on as many synthetic titles.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from _common import finish, peak_bytes, print_table, run_fresh

from igd_ds.items.decisiveness import information_gain, zero_gain
from igd_ds.items.trie import TokenTrie

EOS, NEWLINE, VOCABULARY = 0, 1, 151_936
OUTPUTS = ("token", "parent", "depth", "num_items", "train_count", "zero", "gain")
GAIN_TOLERANCE = 1e-6  # relative: ours is stored as fp32, the plain trie keeps Python floats


def make_items(num_items: int, folder: Path) -> None:
    """Write token_ids, offsets and counts of `num_items` synthetic items."""
    rng = np.random.default_rng(0)

    def zipf_tokens(
        size, kinds=VOCABULARY - 2
    ):  # log-uniform ranks: density 1/rank; 0 and 1 are EOS and newline
        return 2 + (np.exp(rng.random(size) * np.log(kinds)) - 1).astype(np.int32)

    num_series = max(num_items // 20, 1)
    series_length = rng.integers(2, 7, num_series)
    series_tokens = zipf_tokens((num_series, 6))
    series_tokens[:, 0] = zipf_tokens(num_series, 5_000)
    series = (num_series * rng.random(num_items) ** 2).astype(np.int64)
    shared = np.where(rng.random(num_items) < 0.5, series_length[series], 0)
    own = 2 + rng.poisson(6.2, num_items)
    length = shared + own + 2
    offsets = np.concatenate([[0], np.cumsum(length)])
    token_ids = zipf_tokens(offsets[-1])
    token_ids[offsets[:-1]] = zipf_tokens(num_items, 5_000)  # few of the tokens start a title
    for k in range(6):
        in_series = np.flatnonzero(shared > k)
        token_ids[offsets[in_series] + k] = series_tokens[series[in_series], k]
    token_ids[offsets[1:] - 2], token_ids[offsets[1:] - 1] = NEWLINE, EOS
    counts = np.minimum(rng.zipf(1.6, num_items), 10_000) * (rng.random(num_items) > 0.1)
    np.save(folder / "token_ids.npy", token_ids.astype(np.int32))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "counts.npy", counts)
    print("{}")


def build_ours(token_ids, offsets, counts):
    """Structure, fp32 prior gain, zero flags."""
    trie = TokenTrie.build(token_ids, offsets, counts)
    return trie, information_gain(trie, "prior", np.float32), zero_gain(trie)


def flatten_ours(built) -> dict:
    """Output arrays by name."""
    trie, gain, zero = built
    return {"zero": zero, "gain": gain} | {name: getattr(trie, name) for name in OUTPUTS[:5]}


def build_plain(token_ids, offsets, counts):
    """Do the same with dicts: insert every item, then entropies and gains on the way back from a recursion."""
    root = {"items": 0, "count": 0}
    for item in range(len(offsets) - 1):
        count = int(counts[item])
        node = root
        node["items"] += 1
        node["count"] += count
        for token in token_ids[offsets[item] : offsets[item + 1]].tolist():
            child = node.get(token)
            if child is None:
                child = node[token] = {"items": 0, "count": 0}
            node = child
            node["items"] += 1
            node["count"] += count
        node.setdefault("ids", []).append(item)
    total = root["count"]

    def add_gains(node):  # returns the entropy
        if "ids" in node:
            p = node["count"] / total
            return -p * math.log(p) if p > 0 else 0.0
        children = [child for key, child in node.items() if type(key) is int]
        entropies = [add_gains(child) for child in children]
        entropy = math.fsum(entropies)
        for child, below in zip(children, entropies, strict=True):
            child["zero"] = child["count"] == node["count"]
            child["gain"] = 0.0 if child["zero"] else entropy - below
        return entropy

    add_gains(root)
    return root


def flatten_plain(root) -> dict:
    """Output arrays by name, in the breadth-first order of the flat trie."""
    out = {name: [] for name in OUTPUTS}
    level, depth, next_node = [(-1, -1, root)], 0, 1
    while level:
        below = []
        for token, parent, node in level:
            numbers = (
                token,
                parent,
                depth,
                node["items"],
                node["count"],
                node.get("zero", False),
                node.get("gain", 0.0),
            )
            for name, value in zip(OUTPUTS, numbers, strict=True):
                out[name].append(value)
        for number, (_, _, node) in enumerate(level, next_node - len(level)):
            below += [
                (token, number, node[token])
                for token in sorted(key for key in node if type(key) is int)
            ]
        level, depth, next_node = below, depth + 1, next_node + len(below)
    return {name: np.array(values) for name, values in out.items()}


def measure(side: str, folder: Path, save: bool) -> None:
    """In a fresh process: load, build once, report seconds and peak; optionally write the outputs for `compare`."""
    token_ids, offsets, counts = (
        np.load(folder / f"{name}.npy") for name in ("token_ids", "offsets", "counts")
    )
    build, flatten = (build_ours, flatten_ours) if side == "ours" else (build_plain, flatten_plain)
    loaded = peak_bytes()
    start = time.perf_counter()
    built = build(token_ids, offsets, counts)
    seconds, peak = time.perf_counter() - start, peak_bytes() - loaded
    nodes = built[0].num_nodes if side == "ours" else 0
    if save:
        for name, array in flatten(built).items():
            np.save(folder / f"{side}-{name}.npy", array)
    print(json.dumps({"seconds": seconds, "bytes": peak, "nodes": nodes}), flush=True)
    os._exit(0)  # freeing ten million dicts one by one would take longer than the build


def compare(folder: Path) -> None:
    """Assert that both sides wrote the same trie: integers and flags equal, gains to fp32."""
    for name in OUTPUTS:
        ours, plain = (np.load(folder / f"{side}-{name}.npy") for side in ("ours", "plain"))
        if name == "gain":
            np.testing.assert_allclose(ours, plain, rtol=GAIN_TOLERANCE, atol=0)
        else:
            np.testing.assert_array_equal(ours, plain, err_msg=name)
    print(json.dumps({"equal": True}))


def tokenize(num_items: int) -> None:
    """Time `Catalogue.build` (tokenization of titles) with a small byte-level BPE trained on the spot."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from igd_ds.items.catalogue import (
        Catalogue,  # here, with transformers: not in the processes that measure memory
    )

    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(20_000)]
    )
    ranks = (np.exp(rng.random((num_items, 7)) * np.log(len(words))) - 1).astype(int)
    titles = [" ".join(row) for row in words[ranks]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        titles[:20_000], 8_192, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    train = SimpleNamespace(targets=np.zeros(1, np.int32))
    dataset = SimpleNamespace(
        titles=titles,
        semantic_ids=None,
        splits={"train": train},
        fingerprint="",
        num_items=num_items,
    )
    start = time.perf_counter()
    catalogue = Catalogue.build(dataset, tokenizer)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens_per_item": len(catalogue.token_ids) / num_items}))


def run_step(step: str, size: int, folder: Path, save: bool) -> None:
    """What a child process does."""
    if step == "make":
        make_items(size, folder)
    elif step == "compare":
        compare(folder)
    elif step == "tokenize":
        tokenize(size)
    else:
        measure(step, folder, save)


def main() -> None:
    """Run all sizes and print the table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="10 k and 100 k items only; under 50 s"
    )
    quick = parser.parse_args().quick
    sizes = [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000, 5_000_000]
    rows, figures = [], {}
    for size in sizes:
        label = f"{size // 1000}k" if size < 10**6 else f"{size // 10**6}m"
        with tempfile.TemporaryDirectory() as folder:
            run_fresh(__file__, "make", size, folder)
            runs = [run_fresh(__file__, "ours", size, folder, run == 0) for run in range(3)]
            ours = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            row = [f"{size:,}", f"{int(ours['nodes']):,}", ours["seconds"], ours["bytes"] / 2**20]
            figures["bytes_per_node"] = ours["bytes"] / ours["nodes"]
            if size <= 10**6:
                runs = [
                    run_fresh(__file__, "plain", size, folder, run == 0)
                    for run in range(1 if size == 10**6 else 3)
                ]
                plain = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                run_fresh(__file__, "compare", size, folder)
                speedup, ratio = plain["seconds"] / ours["seconds"], plain["bytes"] / ours["bytes"]
                row += [plain["seconds"], plain["bytes"] / 2**20, speedup, ratio]
                if size == (100_000 if quick else 10**6):
                    figures |= {f"speedup_{label}": speedup, f"memory_ratio_{label}": ratio}
            else:
                row += [
                    "-",
                    "-",
                    "-",
                    "-",
                ]  # by the plain trie's bytes per node it would need over 10 GiB
                figures |= {
                    f"seconds_{label}": ours["seconds"],
                    f"peak_gib_{label}": ours["bytes"] / 2**30,
                }
        rows.append([*row, figures["bytes_per_node"]])
    titles = 20_000 if quick else 100_000
    text = run_fresh(__file__, "tokenize", titles, "")
    print_table(
        [
            "items",
            "nodes",
            "s",
            "peak MiB",
            "plain s",
            "plain MiB",
            "speed x",
            "memory x",
            "bytes/node",
        ],
        rows,
    )
    print(
        f"tokenization, apart: {titles:,} titles ({text['tokens_per_item']:.1f} tokens each) in {text['seconds']:.2f} s"
    )
    finish("trie", figures, quick)


if __name__ == "__main__":
    if len(sys.argv) > 2:  # one step in its own process: STEP SIZE FOLDER [SAVE]
        run_step(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), save=sys.argv[4:] == ["True"])
    else:
        main()
