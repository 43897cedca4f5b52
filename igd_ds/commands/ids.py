"""Give a dataset's items semantic IDs: embeddings → quantizer → collisions resolved → DATASET2 and measures of its IDs.

    igd ids --dataset DATASET --embeddings EMBEDDINGS --quantizer rq-vae --levels 4 --codes 256 \\
        --collisions reassign --output DATASET2
    igd ids --dataset DATASET --quantizer existing --collisions reassign --output DATASET2

DATASET2 equals DATASET except for `semantic_id`, the data card, and the report under "semantic_ids" of dataset.json. `existing`
keeps the IDs the dataset has and only resolves their collisions and measures them. What training leaves lies in
DATASET2.quantizer/ (or --log_dir): tensorboard/, quantizer.safetensors (codebooks and networks), semantic_ids.json (the report
and Figure 1 of MTC: purity gain by token). Run again on a finished output with the same request, it does nothing; with another
request it refuses.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from igd_ds.data.card import write_card
from igd_ds.data.dataset import SPLITS, fingerprint, read_info, sha256_of
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.items.embeddings import ARRAY, load_embeddings
from igd_ds.semantic_ids import collisions as semantic_ids
from igd_ds.semantic_ids import quantizers
from igd_ds.semantic_ids.quantizers import QuantizerOptions

DEFAULTS = asdict(QuantizerOptions())
ALL_FIT = ("levels", "codes", "embeddings")
ONLY_RQ_VAE = tuple(name for name in DEFAULTS if name not in ("levels", "codes", "seed"))
FLAG_OF = {"learning_rate": "lr"}
LOGS = ("tensorboard", "quantizer.safetensors", "semantic_ids.json")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; flags that the chosen quantizer does not use are errors."""
    parser = argparse.ArgumentParser(description="Give a dataset's items semantic IDs.")
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DATASET2", help="dataset folder to make"
    )
    parser.add_argument("--quantizer", required=True, choices=[*quantizers.QUANTIZERS, "existing"])
    parser.add_argument("--embeddings", type=Path, help="folder that igd embed made")
    parser.add_argument(
        "--collisions", choices=semantic_ids.COLLISIONS, default=semantic_ids.COLLISIONS[0]
    )
    parser.add_argument(
        "--log_dir",
        type=Path,
        help="folder to make for what training leaves (default: DATASET2.quantizer)",
    )
    for name, what in [
        ("levels", "codes per ID"),
        ("codes", "size of a level's codebook"),
        ("seed", "of training and of the collisions' random choices"),
        ("epochs", "rq-vae: passes over the items"),
        ("learning_rate", "rq-vae: Adam's learning rate"),
        ("batch_size", "rq-vae: items per step"),
        ("latent", "rq-vae: width of the latent space"),
        ("commitment", "rq-vae: weight of the commitment term"),
        (
            "sinkhorn",
            "rq-vae: regularisation of evenly balanced assignment while training, e.g. 0.003; 0 is off",
        ),
        ("ema", "rq-vae: decay of moving-average codebooks, e.g. 0.99; 0 trains them by gradient"),
    ]:
        flag, default = FLAG_OF.get(name, name), DEFAULTS[name]
        parser.add_argument(
            f"--{flag}", dest=name, type=type(default), help=f"{what} (default {default})"
        )
    parser.add_argument(
        "--hidden", type=int, nargs="+", help="rq-vae: widths of the encoder's hidden layers"
    )
    args = parser.parse_args(argv)
    unused = (
        [*ALL_FIT, *ONLY_RQ_VAE]
        if args.quantizer == "existing"
        else ONLY_RQ_VAE
        if args.quantizer != "rq-vae"
        else []
    )
    for name in unused:
        if getattr(args, name) is not None:
            parser.error(
                f"--{FLAG_OF.get(name, name)}: --quantizer {args.quantizer} does not use it"
            )
    if args.quantizer != "existing" and args.embeddings is None:
        parser.error(f"--quantizer {args.quantizer} needs --embeddings; make them with igd embed")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.hidden = tuple(args.hidden)
    args.log_dir = args.log_dir or args.output.with_name(f"{args.output.name}.quantizer")
    return args


def claim_log_dir(folder: Path) -> None:
    """Make the log folder anew; what an unfinished run left in it goes. Raises ValueError where it holds anything else."""
    if folder.exists():
        if foreign := sorted({path.name for path in folder.iterdir()} - set(LOGS)):
            raise UsageError(
                f"--log_dir {folder} holds other things ({foreign[0]}); choose a new folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def fit(args: argparse.Namespace, items: pa.Table) -> tuple[np.ndarray, list[list[str]], dict]:
    """Learn a quantizer; return codes (N, L), the names of each level's codes, and what the fit reports."""
    options = QuantizerOptions(
        **{field.name: getattr(args, field.name) for field in fields(QuantizerOptions)}
    )
    vectors = load_embeddings(args.embeddings, items).vectors
    quantizers.check_options(args.quantizer, options, *vectors.shape)
    sizes = [options.codes] * options.levels
    semantic_ids.check_collisions(len(vectors), sizes, args.collisions)
    claim_log_dir(args.log_dir)
    say_every = (
        max(options.epochs // 20, 1) if args.quantizer == "rq-vae" else 1
    )  # k-means: each level
    with SummaryWriter(str(args.log_dir / "tensorboard")) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            if "quantizer/reconstruction" in values and (step + 1) % say_every == 0:
                tqdm.write(
                    f"step {step:5d}  "
                    + "  ".join(f"{tag.split('/')[1]} {value:.4g}" for tag, value in values.items())
                )

        result = quantizers.fit(args.quantizer, vectors, options, log)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in result.quantizer.state_dict().items()
    }
    save_file(tensors, args.log_dir / "quantizer.safetensors")
    names = [semantic_ids.code_names(level, size) for level, size in enumerate(sizes)]
    return (
        result.codes,
        names,
        {"reconstruction_error": result.reconstruction_error, "warnings": result.warnings},
    )


def existing(args: argparse.Namespace, items: pa.Table) -> tuple[np.ndarray, list[list[str]], dict]:
    """Return the codes (N, L) of the dataset's own semantic IDs, the names of each level's codes, and an empty report."""
    ids = items["semantic_id"].to_pylist()
    lengths = {len(codes or ()) for codes in ids}
    if len(lengths) != 1 or 0 in lengths:
        item = next(
            i for i, codes in enumerate(ids) if len(codes or ()) != len(ids[0] or ()) or not codes
        )
        raise UsageError(
            f"{args.dataset}: --quantizer existing needs IDs of one length for all items, found lengths "
            f"{sorted(lengths)}, item {item} has {ids[item]}; make new IDs with another --quantizer"
        )
    names, columns = [], []
    for codes in zip(*ids, strict=True):
        level_names, column = np.unique(np.array(codes), return_inverse=True)
        names.append(level_names.tolist())
        columns.append(column)
    codes = np.stack(columns, axis=1).astype(np.int32)
    semantic_ids.check_collisions(len(codes), list(map(len, names)), args.collisions)
    letter = semantic_ids.LEVEL_LETTERS[len(names)]
    if args.collisions == "extra" and (
        clash := [name for level in names for name in level if name.startswith(f"<{letter}_")]
    ):
        raise UsageError(
            f"{args.dataset}: the extra level's codes are called <{letter}_0> …, and {clash[0]} exists; take reassign"
        )
    claim_log_dir(args.log_dir)
    return codes, names, {"warnings": []}


def report_of(codes: np.ndarray, unique: np.ndarray, sizes: list[int], counts: np.ndarray) -> dict:
    """Measure IDs before (N, L) and after (N, L or L+1) collisions are resolved; `counts` (N,) training targets per item."""
    shares, perplexities = zip(
        *(semantic_ids.use_and_perplexity(codes[:, i], size) for i, size in enumerate(sizes)),
        strict=True,
    )
    final_sizes = [*sizes, *(int(level.max()) + 1 for level in unique.T[len(sizes) :])]
    return {
        "items": len(codes),
        "codebook_sizes": final_sizes,
        "collision_rate_before": semantic_ids.collision_rate(codes),
        "collision_rate": semantic_ids.collision_rate(unique),
        "changed_items": int((unique[:, : len(sizes)] != codes).any(1).sum()),
        "use": list(shares),
        "perplexity": list(perplexities),
        **semantic_ids.trie_measures(unique, final_sizes, counts),
    }


def write_dataset_with_ids(
    args: argparse.Namespace, info: dict, items: pa.Table, ids: Sequence, report: dict
) -> None:
    """Write DATASET2: every file of DATASET as it is, except items, card and dataset.json; complete or absent."""
    partial = args.output.with_name(f"{args.output.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process id
    partial.mkdir(parents=True)
    try:
        for name in info["files"]:
            if name != "items.parquet":
                shutil.copyfile(args.dataset / name, partial / name)
        column = pa.array(ids, pa.list_(pa.string()))
        table = items.set_column(items.column_names.index("semantic_id"), "semantic_id", column)
        pq.write_table(
            table, partial / "items.parquet", compression="zstd", row_group_size=table.num_rows
        )
        files = info["files"] | {"items.parquet": sha256_of(partial / "items.parquet")}
        info = info | {"files": files, "semantic_ids": report}
        write_card(
            partial,
            info,
            table,
            {name: pq.read_table(partial / f"{name}.parquet") for name in SPLITS},
        )
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        (partial / "dataset.json").write_text(text, encoding="utf-8")
        os.rename(partial, args.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(args: argparse.Namespace) -> dict | None:
    """Make DATASET2 and return its report; None when it is there already. Raises ValueError on bad input."""
    info = read_info(args.dataset)
    request = {
        "dataset": fingerprint(info),
        "quantizer": args.quantizer,
        "collisions": args.collisions,
        "seed": args.seed,
    }
    if args.quantizer != "existing":
        request |= {"levels": args.levels, "codes": args.codes}
        if args.quantizer == "rq-vae":
            request |= {name: getattr(args, name) for name in ONLY_RQ_VAE} | {
                "hidden": list(args.hidden)
            }
        if (args.embeddings / ARRAY).is_file():
            request["embeddings_sha256"] = sha256_of(args.embeddings / ARRAY)
    if args.output.exists():
        if read_info(args.output).get("semantic_ids", {}).get("request") == request:
            return None
        raise UsageError(
            f"{args.output} exists and was not made by this request; delete it or choose another --output"
        )
    items = pq.read_table(args.dataset / "items.parquet")
    codes, names, report = (existing if args.quantizer == "existing" else fit)(args, items)
    sizes = list(map(len, names))
    unique = semantic_ids.resolve_collisions(codes, sizes, args.collisions, args.seed)
    if unique.shape[1] > len(names):
        names.append(semantic_ids.code_names(len(names), int(unique[:, -1].max()) + 1))
    targets = pq.read_table(args.dataset / "train.parquet", columns=["target"])["target"].to_numpy()
    measures = report_of(codes, unique, sizes, np.bincount(targets, minlength=len(codes)))
    by_token = measures.pop("purity_gain_by_token")
    report = {"request": request} | measures | report
    report["warnings"] = report["warnings"] + semantic_ids.collapse_warnings(codes, sizes)
    figure = {
        name: gain
        for level, gains in zip(names, by_token, strict=True)
        for name, gain in zip(level, gains, strict=True)
    }
    write_json(args.log_dir / "semantic_ids.json", report | {"purity_gain_by_token": figure})
    ids = [
        [level[code] for level, code in zip(names, path, strict=True)] for path in unique.tolist()
    ]
    write_dataset_with_ids(args, info, items, ids, report)
    return report


def show(report: dict) -> None:
    """Print the report as a table of levels and a few lines."""
    print(
        f"{'level':8s}{'codes':>8s}{'use':>8s}{'perplexity':>12s}{'filtering':>11s}{'purity gain':>13s}"
    )
    for level, size in enumerate(report["codebook_sizes"]):
        raw = level < len(report["use"])  # the extra level has no codebook
        use = (
            f"{report['use'][level]:8.1%}{report['perplexity'][level]:12.1f}"
            if raw
            else f"{'':20s}"
        )
        numbers = f"{report['filtering_ratio'][level]:11.2%}{report['purity_gain'][level]:13.4f}"
        print(f"{semantic_ids.LEVEL_LETTERS[level]:8s}{size:8d}{use}{numbers}")
    if "reconstruction_error" in report:
        print(
            f"reconstruction error   {report['reconstruction_error']:.4f} of the embeddings' variance"
        )
    rates = f"{report['collision_rate_before']:.2%} before, {report['collision_rate']:.2%} after"
    print(
        f"collision rate         {rates}; {report['changed_items']} of {report['items']} items changed"
    )
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    try:
        report = make(args)
    except (ValueError, OSError) as error:
        print(f"train_semantic_ids.py: error: {error}", file=sys.stderr)
        return 2
    if report is None:
        print(f"{args.output} is complete and was made by the same request: nothing to do")
    else:
        show(report)
        print(f"dataset                {args.output}\nlogs                   {args.log_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
