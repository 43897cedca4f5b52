"""What a training begins with: dataset, template, tokenizer, pretrained weights, catalogue."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.model_config import shape_file
from igd_ds.backbones.saved import (
    BASE_FILE,
    Origin,
    base_record,
    check_adapter_options,
    check_base,
    check_manifest,
    origin_of,
    pinned,
    weights_sha256,
)
from igd_ds.backbones.tokenizer import added_token_ids, as_saved, load_tokenizer
from igd_ds.config.model import ModelOptions
from igd_ds.contracts import Backbone
from igd_ds.data.cut_titles import with_cut_titles
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import AS_TARGET, Template
from igd_ds.distributed import say
from igd_ds.engine.build import loading_context
from igd_ds.engine.ds_config import DsConfig, dtype_of
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object, sha256_of, write_json
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import edge_gain
from igd_ds.items.shared_paths import SharedPaths, item_texts
from igd_ds.items.store import StoredCatalogue, save_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.prefer_config import PreferConfig
from igd_ds.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TITLES_COMPARED = 200
"""Titles on which the tokenizers before and after saving are compared; a difference is rare."""


@dataclass(frozen=True)
class Inputs:
    """What a run is given, read and checked before a run folder is claimed."""

    template: Template
    dataset: InteractionDataset
    tokenizer: Any
    """Hugging Face tokenizer with EOS and PAD."""
    added_ids: range
    """Tokens that the model's own tokenizer lacks."""
    model_config: Any
    """Hugging Face configuration of the model."""
    backbone: Backbone
    origin: Origin | None = None
    """Where pretrained weights come from; None for random weights."""
    packing: str = "rows"
    """"tree" or "rows"."""
    batching: str = "rows"
    """"chains" or "rows"."""


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
    if template.item == AS_TARGET and model_config.is_encoder_decoder:
        raise UsageError(
            f"--prompt {config.prompt} makes one sequence of prompt and target, which an "
            "encoder-decoder does not read: take --prompt short or codes, or a causal LM"
        )
    dataset = with_cut_titles(dataset, tokenizer, config.max_title_tokens)

    backbone = backbone_of(model_config)
    backbone.fit_model_config(model_config, config, tokenizer, added_ids)
    packing = packing_of(config, backbone, model_config)
    batching = batching_of(config, packing)
    return Inputs(
        template, dataset, tokenizer, added_ids, model_config, backbone, origin, packing, batching
    )


def content_of(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what the files of some settings hold, see `run_folder.claim_run_folder`.

    What holds the dataset, pretrained weights and tokenizer is compared elsewhere.
    """
    content: dict[str, Any] = {"prompt": inputs.template.as_dict()}
    if config.model_config:
        shape = shape_file(config.model_config)
        shape = shape / "config.json" if shape.is_dir() else shape
        if shape.is_file():  # a name on the hub has no file here
            content["model_config"] = sha256_of(shape)
    if item_embeddings := getattr(config.objective_options(), "item_embeddings", ""):
        given = Path(item_embeddings)
        files = [given] if given.is_file() else sorted(given.glob("*.npy"))
        content["item_embeddings"] = [sha256_of(path) for path in files]
    return content


def batching_of(config: TrainConfig, packing: str) -> str:
    """Return "chains" or "rows": what is asked for, or chains where rows are packed as trees.

    Raises:
        UsageError: --no-length_grouping, which chains cannot follow.
    """
    batching = config.batching
    if batching == "auto":
        batching = "chains" if packing == "tree" else "rows"
    if batching == "chains" and not config.length_grouping:
        raise UsageError(
            "--no-length_grouping has no effect with --batching chains, which is what auto means "
            "for row trees: give --batching rows too"
        )
    return batching


def packing_of(config: TrainConfig | PreferConfig, backbone: Backbone, model_config: Any) -> str:
    """Return "tree" or "rows": what is asked for, or row trees where the model can be trained so.

    Raises:
        UsageError: row trees are asked for, and the model cannot read them.
    """
    can = backbone.capabilities(model_config).packed_training
    if config.packing == "tree" and not can:
        raise UsageError(
            f"--packing tree: models of type {model_config.model_type} cannot be trained on row "
            "trees: give --packing rows. Decoders that attend through transformers' "
            "AttentionInterface can: LLaMA, Qwen2, Qwen3, Mistral, Phi-3, Gemma 2 and 3, gpt-oss, "
            "GPT-2 and OPT among others"
        )
    if config.packing != "auto":
        return config.packing
    own_kernel = config.attn_implementation not in ("auto", "sdpa")
    return "tree" if can and not own_kernel else "rows"


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


def as_begun(origin: Origin, run: Path) -> Origin:
    """Return the origin of a run's weights, at the hub commit it began with if it is resumed."""
    path = run / BASE_FILE
    if origin.is_folder or not path.is_file() or not any((run / "checkpoints").glob("step-*")):
        return origin
    record = read_json_object(path, "restore it from the run's backup, or start a new run")
    if record["name"] != origin.name:
        return origin
    return dataclasses.replace(origin, revision=record["commit"])


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
        say(warning, always=True)

    gain = edge_gain(trie, config.decisiveness, config.entropy)
    stored = StoredCatalogue.build(catalogue, trie, gain, config.entropy, config.decisiveness)
    save_catalogue(folder, stored)
    say(
        f"catalogue: {catalogue.num_items} items, {trie.num_nodes} trie nodes, "
        f"{stored.zero_gain.mean():.1%} zero-gain tokens"
    )


def build_model(options: ModelOptions, seed: int, ds: DsConfig, inputs: Inputs) -> torch.nn.Module:
    """Build the model with the same random weights and LoRA matrices on every rank."""
    if inputs.origin and not inputs.origin.adapter:
        options = dataclasses.replace(options, revision=inputs.origin.revision)
    whole = options.load_in_4bit or bool(options.lora_r and inputs.added_ids)
    with loading_context(ds, whole):
        torch.manual_seed(seed)
        return inputs.backbone.build(
            options,
            inputs.model_config,
            dtype_of(ds),
            distributed.device(),
            inputs.added_ids,
            seed,
        )
