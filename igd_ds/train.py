"""Train a recommender that writes the next item token by token. Entry point of `igd train`.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --objective igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → objective → model → engine → the loop (igd_ds/loop.py) → RUN/model.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from igd_ds import distributed, loop
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.saved import (
    BASE_FILE,
    Origin,
    base_record,
    check_adapter_options,
    check_base,
    check_manifest,
    origin_of,
    pinned,
    read_json_object,
    weights_sha256,
)
from igd_ds.backbones.tokenizer import added_token_ids, as_saved, load_tokenizer
from igd_ds.config.options import parse
from igd_ds.data.cut_titles import with_cut_titles
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import Template
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, loading_context
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, dtype_of, resolve_ds_config
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.generative_training import GenerativeTraining, Inputs
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import edge_gain
from igd_ds.items.shared_paths import SharedPaths, item_texts
from igd_ds.items.store import StoredCatalogue, save_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TITLES_COMPARED = 200
"""Titles on which the tokenizers before and after saving are compared; a difference is rare."""


def main() -> int:
    """Run a training from the command line; return the exit code."""
    config = parse(TrainConfig, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    distributed.init(config.timeout, config.master_port)
    ds = resolve_ds_config(config, distributed.world_size(), config.load_in_4bit)
    inputs = load_inputs(config)

    # Claim the run folder; a finished run is left as it is.
    run = Path(config.output_dir)
    tag, finished = distributed.on_main(lambda: open_run_folder(run, config, ds, inputs))
    if finished:
        say(f"{run} is finished: {finished}")
        return 0

    # Build what is trained, then go on from the newest checkpoint or begin.
    training = GenerativeTraining(config, run, inputs, ds["train_micro_batch_size_per_gpu"])
    model = build_model(config, ds, inputs)
    engine = initialize(model, config, ds, training.total_steps)
    lora = bool(config.lora_r)
    state = loop.resume(engine, training, run, tag, inputs.dataset.fingerprint, lora)
    return loop.fit(engine, training, config, run, state, loop.StopRequest(), lora)


def load_inputs(config: TrainConfig) -> Inputs:
    """Read and check everything that is cheap to read, before a run folder is claimed."""
    dataset = InteractionDataset.load(config.dataset)

    # The model.
    origin = origin_to_begin_with(config) if config.model_name_or_path else None
    name, revision = (origin.name, origin.revision) if origin else (config.model_config, "")
    model_config = read_model_config(name, config.trust_remote_code, revision)

    # The tokenizer that an evaluation will load, and its tokens beyond the model's own.
    tokenizer = load_settled_tokenizer(config, origin, model_config, dataset.titles)
    added_ids = range(0)
    if origin and (config.tokenizer or origin.adapter):
        added_ids = added_token_ids(tokenizer, name, config.trust_remote_code, revision)

    template = Template.load(config.prompt, tokenizer)
    dataset = with_cut_titles(dataset, tokenizer, config.max_title_tokens)

    backbone = backbone_of(model_config)
    backbone.fit_model_config(model_config, config, tokenizer, added_ids)
    return Inputs(template, dataset, tokenizer, added_ids, model_config, backbone, origin)


def origin_to_begin_with(config: TrainConfig) -> Origin:
    """Return where the pretrained weights come from, at one commit on all ranks.

    Raises:
        UsageError: there is no such model on the hub, or it is an adapter that was trained with
            other LoRA options.
    """
    origin = origin_of(config.model_name_or_path, config.revision)
    check_adapter_options(origin, config)
    begun = as_begun(origin, Path(config.output_dir))
    commit = distributed.on_main(lambda: pinned(begun).revision)
    return dataclasses.replace(origin, revision=commit)


def load_settled_tokenizer(
    config: TrainConfig,
    origin: Origin | None,
    model_config: Any,
    titles: Sequence[str | None],
) -> "PreTrainedTokenizerBase":
    """Load --tokenizer, or the model's own (an adapter's where it has one), as it will be saved.

    Some titles show whether saving changes what it does.
    """
    name, revision = config.tokenizer, ""
    if origin and not name:
        name, revision = origin.name, origin.revision
        if origin.adapter and (origin.adapter / "tokenizer_config.json").is_file():
            name, revision = str(origin.adapter), ""
    tokenizer = load_tokenizer(name, config.trust_remote_code, revision)

    compared = [title for title in titles[:TITLES_COMPARED] if title is not None]
    saved_beside = None if config.lora_r else model_config
    return as_saved(tokenizer, saved_beside, compared, config.trust_remote_code)


def as_begun(origin: Origin, run: Path) -> Origin:
    """Return the origin of a run's weights, at the hub commit it began with if it is resumed."""
    path = run / BASE_FILE
    if origin.is_folder or not path.is_file() or not any((run / "checkpoints").glob("step-*")):
        return origin
    record = read_json_object(path, "restore it from the run's backup, or start a new run")
    if record["name"] != origin.name:
        return origin
    return dataclasses.replace(origin, revision=record["commit"])


def open_run_folder(
    run: Path, config: TrainConfig, ds: DsConfig, inputs: Inputs
) -> tuple[str | None, str]:
    """Claim the run folder. Rank 0 only.

    Returns:
        The checkpoint to go on from, or None, and the summary of a finished run, else "".
    """
    claim_run_folder(run, config, ds, distributed.world_size())
    if summary := read_summary(run):
        return None, json.dumps(summary, indent=2, sort_keys=True)

    tag = newest_checkpoint(run / "checkpoints", config.trust_checkpoint)
    trained = inputs.backbone.num_trained_parameters(inputs.model_config, config, inputs.added_ids)
    check_disk_space(run, trained, config.keep_checkpoints)
    if not (run / "catalogue").is_dir():
        build_catalogue(run / "catalogue", config, inputs)
    if inputs.origin:
        record_base(run / BASE_FILE, inputs.origin, bool(tag and config.lora_r))
    return tag, ""


def record_base(path: Path, origin: Origin, is_needed: bool) -> None:
    """Record which pretrained weights a training begins with. Rank 0 only.

    Args:
        path: the record; RUN/model takes it over.
        origin: of the weights.
        is_needed: whether a checkpoint needs these weights, because it holds only an adapter.

    Raises:
        UsageError: the weights are not those that the run began with, or that the adapter was
            trained on; or a file of the folder changed since it was saved.
    """
    if origin.adapter:
        check_manifest(origin.adapter)
        sha256 = check_base(origin, is_named=False)
    else:
        check_manifest(Path(origin.name))
        sha256 = weights_sha256(origin)
    record = base_record(origin, sha256)

    if is_needed and path.is_file():
        before = read_json_object(path, "restore it from the run's backup, or start a new run")
        if before["sha256"] != record["sha256"]:
            raise UsageError(
                f"--model_name_or_path {origin.name} has other weights than when {path.parent} "
                "began: restore them, or start a new run"
            )
    write_json(path, record)


def build_catalogue(folder: Path, config: TrainConfig, inputs: Inputs) -> None:
    """Tokenize the items, build the trie and its gain, and store them for all ranks to map.

    Rank 0 only.

    Raises:
        UsageError: an item is so long that no prompt fits --max_length, or the tokenizer cannot
            tell different items apart and --allow_merged_titles is not given.
    """
    kind = None if config.item_kind == "auto" else config.item_kind
    catalogue = Catalogue.build(inputs.dataset, inputs.tokenizer, kind)
    if catalogue.max_length >= config.max_length:
        dataset, item = inputs.dataset, int(np.argmax(np.diff(catalogue.offsets)))
        text = dataset.titles[item] or "".join((dataset.semantic_ids or [])[item])
        raise UsageError(
            f"item {item} ({text[:80]!r}…) has {catalogue.max_length} "
            f"tokens, which leaves no prompt within --max_length {config.max_length}: raise it, or "
            "cut long titles with --max_title_tokens"
        )

    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    shared = SharedPaths.find(trie.leaf_of_item, item_texts(inputs.dataset, catalogue.kind))
    if not config.allow_merged_titles:
        shared.refuse_merged(inputs.tokenizer)
    if warning := shared.warning():
        say(warning)

    gain = edge_gain(trie, config.decisiveness, config.entropy)
    stored = StoredCatalogue.build(catalogue, trie, gain, config.entropy, config.decisiveness)
    save_catalogue(folder, stored)
    say(
        f"catalogue: {catalogue.num_items} items, {trie.num_nodes} trie nodes, "
        f"{stored.zero_gain.mean():.1%} zero-gain tokens"
    )


def build_model(config: TrainConfig, ds: DsConfig, inputs: Inputs) -> torch.nn.Module:
    """Build the model with the same random weights and LoRA matrices on every rank."""
    options = config
    if inputs.origin and not inputs.origin.adapter:
        options = dataclasses.replace(config, revision=inputs.origin.revision)
    whole = config.load_in_4bit or bool(config.lora_r and inputs.added_ids)
    with loading_context(ds, whole):
        torch.manual_seed(config.seed)
        return inputs.backbone.build(
            options,
            inputs.model_config,
            dtype_of(ds),
            distributed.device(),
            inputs.added_ids,
            config.seed,
        )


if __name__ == "__main__":
    distributed.run(main)
