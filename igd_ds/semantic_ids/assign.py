"""Give a dataset's items semantic IDs: fit a quantizer, resolve collisions, write the new dataset.

The log folder holds tensorboard/, quantizer.safetensors (codebooks and networks) and
semantic_ids.json (the report, and the purity gain by token of MTC Figure 1). semantic_ids.json is
written first, with the request alone: it says whose folder this is.

Letters in shapes: N items, L levels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from igd_ds.data.card import write_card
from igd_ds.data.dataset import SPLITS, fingerprint, read_info
from igd_ds.errors import UsageError
from igd_ds.folders import (
    claim,
    forget_lock,
    is_free,
    new_folder,
    read_json_object,
    refuse_other_request,
    sha256_of,
    write_json,
    write_text,
)
from igd_ds.items.embeddings import ARRAY, load_embeddings
from igd_ds.semantic_ids import collisions, quantizers
from igd_ds.semantic_ids.letter import load_collaborative
from igd_ds.semantic_ids.quantizers import QuantizerOptions

EXISTING = "existing"
"""Value of `--quantizer` that keeps the IDs that the dataset has."""
ONLY_RQ_VAE = tuple(
    name for name in asdict(QuantizerOptions()) if name not in ("levels", "codes", "seed")
)
"""Fields of QuantizerOptions that only RQ-VAE uses."""
LETTER = ("cf_weight", "cf_temperature", "diversity_weight")
"""Those of them that belong to LETTER's losses."""
TENSORBOARD, QUANTIZER, REPORT = "tensorboard", "quantizer.safetensors", "semantic_ids.json"
"""The entries of a log folder."""


@dataclass(frozen=True)
class IDRequest:
    """Which dataset gets semantic IDs, and how they are made."""

    dataset: Path
    """Canonical dataset folder."""
    output: Path
    """Dataset folder to make."""
    log_dir: Path
    """Folder to make for logs, the fitted quantizer and the report."""
    quantizer: str
    """A key of QUANTIZERS, or EXISTING."""
    collisions: str = collisions.COLLISIONS[0]
    """A name in COLLISIONS."""
    embeddings: Path | None = None
    """Folder that `igd embed` made; None for EXISTING."""
    options: QuantizerOptions = field(default_factory=QuantizerOptions)
    cf_run: Path | None = None
    """RUN of `igd baseline` whose item embeddings LETTER's collaborative loss takes."""


@dataclass(frozen=True)
class Assigned:
    """Codes of all items, before collisions are resolved at random."""

    codes: np.ndarray
    """int32 (N, L)."""
    separated: np.ndarray
    """The same (N, L), after the quantizer has changed equal IDs in its own way, if it has one."""
    names: list[list[str]]
    """The token of each code, by level."""
    report: dict[str, Any]
    """The report's entries on how the codes were made; it has at least the key "warnings"."""


def assign_ids(request: IDRequest) -> dict[str, Any] | None:
    """Write the dataset with semantic IDs and the log folder.

    Returns:
        The report, as under "semantic_ids" in the new dataset.json; None if the output is complete
        and was made by the same request.

    Raises:
        UsageError: the request cannot work, or `output` or `log_dir` holds something else.
    """
    info = read_info(request.dataset)
    record = _record(request, info)
    if not is_free(request.output):
        forget_lock(request.output)
        made = read_info(request.output).get("semantic_ids", {}).get("request", {})
        refuse_other_request(request.output, made, record, "--output")
        return None

    # Codes, and the same codes without collisions.
    items = pq.read_table(request.dataset / "items.parquet")
    if request.quantizer == EXISTING:
        assigned = existing_ids(request, items, record)
    else:
        assigned = fit_ids(request, items, record)
    codes, names = assigned.codes, list(assigned.names)
    sizes = [len(level) for level in names]
    unique = collisions.resolve_collisions(
        assigned.separated, sizes, request.collisions, request.options.seed
    )
    if unique.shape[1] > len(names):
        names.append(collisions.code_names(len(names), int(unique[:, -1].max()) + 1))

    # The report.
    train = pq.read_table(request.dataset / "train.parquet", columns=["target"])
    counts = np.bincount(train["target"].to_numpy(), minlength=len(codes))
    measures = measures_of(codes, unique, sizes, counts)
    by_token = measures.pop("purity_gain_by_token")
    report = {"request": record} | measures | assigned.report
    report["warnings"] = report["warnings"] + collisions.collapse_warnings(codes, sizes)

    # The files.
    figure = {
        name: gain
        for level, gains in zip(names, by_token, strict=True)
        for name, gain in zip(level, gains, strict=True)
    }
    log = report | {"purity_gain_by_token": figure}
    write_json(request.log_dir / REPORT, log)
    ids = [
        [level[code] for level, code in zip(names, path, strict=True)] for path in unique.tolist()
    ]
    write_dataset_with_ids(request, info, items, ids, report)
    return report


def _record(request: IDRequest, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the IDs depend on, as JSON values; it is stored in the report."""
    record: dict[str, Any] = {
        "dataset": fingerprint(info),
        "quantizer": request.quantizer,
        "collisions": request.collisions,
        "seed": request.options.seed,
    }
    if request.quantizer == EXISTING:
        return record

    options = asdict(request.options)
    record |= {"levels": options["levels"], "codes": options["codes"]}
    if request.quantizer == "rq-vae":
        record |= {name: options[name] for name in ONLY_RQ_VAE if name not in LETTER}
        record["hidden"] = list(options["hidden"])
        if options["diversity_weight"]:
            record["diversity_weight"] = options["diversity_weight"]
    if request.cf_run is not None:
        record |= {name: options[name] for name in ("cf_weight", "cf_temperature")}
        if (weights := request.cf_run / "model" / "model.safetensors").is_file():
            record["cf_sha256"] = sha256_of(weights)
    if request.embeddings is not None and (request.embeddings / ARRAY).is_file():
        record["embeddings_sha256"] = sha256_of(request.embeddings / ARRAY)
    return record


def fit_ids(request: IDRequest, items: pa.Table, record: Mapping[str, Any]) -> Assigned:
    """Learn a quantizer from the items' embeddings and return its codes.

    Args:
        request: names embeddings, options and log folder.
        items: the table of items.parquet.
        record: the request as JSON values, which claims the log folder.

    Raises:
        UsageError: the embeddings or the options do not fit the items, or the log folder holds
            something else.
    """
    assert request.embeddings is not None, "a quantizer needs embeddings"
    options = request.options
    vectors = load_embeddings(request.embeddings, items).vectors
    sizes = [options.codes] * options.levels
    quantizers.check_options(request.quantizer, options, *vectors.shape)
    collisions.check_collisions(len(vectors), sizes, request.collisions)
    collaborative = None
    if request.cf_run is not None:
        trained_on = fingerprint(read_info(request.dataset))
        collaborative = load_collaborative(request.cf_run, trained_on, options.latent)
    claim_log_dir(request.log_dir, record)

    # A step is an epoch of RQ-VAE, or a level of k-means.
    print_every = max(options.epochs // 20, 1) if request.quantizer == "rq-vae" else 1
    with SummaryWriter(str(request.log_dir / TENSORBOARD)) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            if "quantizer/reconstruction" in values and (step + 1) % print_every == 0:
                shown = [f"{tag.split('/')[1]} {value:.4g}" for tag, value in values.items()]
                tqdm.write(f"step {step:5d}  " + "  ".join(shown))

        result = quantizers.fit(request.quantizer, vectors, options, log, collaborative)

    separated = result.codes
    if request.collisions == "reassign":
        separated = result.quantizer.separate(vectors, result.codes)

    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in result.quantizer.state_dict().items()
    }
    save_file(tensors, request.log_dir / QUANTIZER)

    names = [collisions.code_names(level, size) for level, size in enumerate(sizes)]
    report = {"reconstruction_error": result.reconstruction_error, "warnings": result.warnings}
    return Assigned(result.codes, separated, names, report)


def existing_ids(request: IDRequest, items: pa.Table, record: Mapping[str, Any]) -> Assigned:
    """Return the codes of the dataset's own semantic IDs.

    Args:
        request: names the log folder and what happens to equal IDs.
        items: the table of items.parquet.
        record: the request as JSON values, which claims the log folder.

    Raises:
        UsageError: an item has no ID, the IDs have different lengths, collisions cannot be resolved
            as asked, or the log folder holds something else.
    """
    ids = items["semantic_id"].to_pylist()
    lengths = {len(codes or ()) for codes in ids}
    if len(lengths) != 1 or 0 in lengths:
        item = next(
            i for i, codes in enumerate(ids) if len(codes or ()) != len(ids[0] or ()) or not codes
        )
        raise UsageError(
            f"{request.dataset}: --quantizer existing needs IDs of one length for all items, found "
            f"lengths {sorted(lengths)} (item {item} has {ids[item]}); make new IDs with another "
            "--quantizer"
        )

    # Number the codes of each level in sorted order.
    names, columns = [], []
    for level in zip(*ids, strict=True):
        level_names, column = np.unique(np.array(level), return_inverse=True)
        names.append(level_names.tolist())
        columns.append(column)
    codes = np.stack(columns, axis=1).astype(np.int32)

    collisions.check_collisions(len(codes), [len(level) for level in names], request.collisions)
    if request.collisions == "extra":
        letter = collisions.LEVEL_LETTERS[len(names)]
        clashes = [name for level in names for name in level if name.startswith(f"<{letter}_")]
        if clashes:
            raise UsageError(
                f"{request.dataset}: the codes of the extra level are called <{letter}_0> …, but "
                f"{clashes[0]} exists already; give --collisions reassign"
            )
    claim_log_dir(request.log_dir, record)
    return Assigned(codes, codes, names, {"warnings": []})


def claim_log_dir(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the log folder; what an earlier start of the same request left in it is deleted.

    Raises:
        UsageError: the folder holds the logs of another request or anything else, or another
            process uses it.
    """
    report = folder / REPORT
    if claim(folder, REPORT, "--log_dir", f"{REPORT} of igd ids"):
        there = read_json_object(report, f"delete {folder} or choose another --log_dir")
        refuse_other_request(folder, there.get("request", {}), record, "--log_dir")
    write_json(report, {"request": record})
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
    (folder / QUANTIZER).unlink(missing_ok=True)


def measures_of(
    codes: np.ndarray, unique: np.ndarray, sizes: Sequence[int], counts: np.ndarray
) -> dict[str, Any]:
    """Measure IDs before and after their collisions are resolved, as JSON values.

    Args:
        codes: (N, L), before.
        unique: (N, L) or (N, L+1), after.
        sizes: L codebook sizes.
        counts: int64 (N,), training targets per item.
    """
    used = [collisions.use_and_perplexity(codes[:, i], size) for i, size in enumerate(sizes)]
    final_sizes = [*sizes, *(int(level.max()) + 1 for level in unique.T[len(sizes) :])]
    return {
        "items": len(codes),
        "codebook_sizes": final_sizes,
        "collision_rate_before": collisions.collision_rate(codes),
        "collision_rate": collisions.collision_rate(unique),
        "changed_items": int((unique[:, : len(sizes)] != codes).any(1).sum()),
        "use": [share for share, _ in used],
        "perplexity": [perplexity for _, perplexity in used],
        **asdict(collisions.trie_measures(unique, final_sizes, counts)),
    }


def write_dataset_with_ids(
    request: IDRequest,
    info: Mapping[str, Any],
    items: pa.Table,
    ids: Sequence[Sequence[str]],
    report: Mapping[str, Any],
) -> None:
    """Write a copy of the dataset with new IDs; the folder appears only when it is complete.

    All files are copied except items.parquet, the data card and dataset.json, which are new.

    Args:
        request: names the two folders.
        info: dataset.json of the original.
        items: the table of the original items.parquet.
        ids: the codes of each item.
        report: goes into the new dataset.json under "semantic_ids".
    """
    with new_folder(request.output) as unfinished:
        for name in info["files"]:
            if name != "items.parquet":
                shutil.copyfile(request.dataset / name, unfinished / name)

        column = pa.array(ids, pa.list_(pa.string()))
        table = items.set_column(items.column_names.index("semantic_id"), "semantic_id", column)
        path = unfinished / "items.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=table.num_rows)

        files = info["files"] | {"items.parquet": sha256_of(path)}
        info = {**info, "files": files, "semantic_ids": report}
        splits = {name: pq.read_table(unfinished / f"{name}.parquet") for name in SPLITS}
        write_card(unfinished, info, table, splits)
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        write_text(unfinished / "dataset.json", text)
