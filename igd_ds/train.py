"""Train a recommender that writes the next item token by token. Entry point of `igd train`.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --objective igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → objective → model → engine → the loop (igd_ds/loop.py) → RUN/model.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from igd_ds import distributed, loop
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.tokenizer import added_token_ids, load_tokenizer
from igd_ds.config.options import parse
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import Template
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, loading_context
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, dtype_of, resolve_ds_config
from igd_ds.errors import UsageError
from igd_ds.generative_training import GenerativeTraining, Inputs
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import edge_gain
from igd_ds.items.store import StoredCatalogue, save_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.run_folder import claim_run_folder
from igd_ds.train_config import TrainConfig


def main() -> int:
    """Run a training from the command line; return the exit code."""
    config = parse(TrainConfig, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    distributed.init()
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
    template = Template.load(config.prompt)
    dataset = InteractionDataset.load(config.dataset)

    model_name = config.model_config or config.model_name_or_path
    tokenizer = load_tokenizer(config.tokenizer or model_name, config.trust_remote_code)
    added_ids = range(0)
    if config.tokenizer and config.model_name_or_path:
        added_ids = added_token_ids(tokenizer, config.model_name_or_path, config.trust_remote_code)

    model_config = read_model_config(model_name, config.trust_remote_code)
    backbone = backbone_of(model_config)
    backbone.fit_model_config(model_config, config, tokenizer, added_ids)
    return Inputs(template, dataset, tokenizer, added_ids, model_config, backbone)


def open_run_folder(
    run: Path, config: TrainConfig, ds: DsConfig, inputs: Inputs
) -> tuple[str | None, str]:
    """Claim the run folder. Rank 0 only.

    Returns:
        The checkpoint to go on from, or None, and the summary of a finished run, else "".
    """
    claim_run_folder(run, config, ds, distributed.world_size())
    if (run / "summary.json").is_file():
        return None, (run / "summary.json").read_text().strip()

    tag = newest_checkpoint(run / "checkpoints")
    trained = inputs.backbone.num_trained_parameters(inputs.model_config, config, inputs.added_ids)
    check_disk_space(run, trained, config.keep_checkpoints)
    if not (run / "catalogue").is_dir():
        build_catalogue(run / "catalogue", config, inputs)
    return tag, ""


def build_catalogue(folder: Path, config: TrainConfig, inputs: Inputs) -> None:
    """Tokenize the items, build the trie and its gain, and store them for all ranks to map.

    Rank 0 only.

    Raises:
        UsageError: an item is so long that no prompt fits --max_length.
    """
    kind = None if config.item_kind == "auto" else config.item_kind
    catalogue = Catalogue.build(inputs.dataset, inputs.tokenizer, kind)
    if catalogue.max_length >= config.max_length:
        dataset, item = inputs.dataset, int(np.argmax(np.diff(catalogue.offsets)))
        text = dataset.titles[item] or "".join((dataset.semantic_ids or [])[item])
        raise UsageError(
            f"item {item} ({text[:80]!r}…) has {catalogue.max_length} "
            f"tokens, which leaves no prompt within --max_length {config.max_length}: raise it, or "
            "shorten or drop the item"
        )

    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    gain = edge_gain(trie, config.decisiveness, config.entropy)
    stored = StoredCatalogue.build(catalogue, trie, gain, config.entropy, config.decisiveness)
    save_catalogue(folder, stored)
    say(
        f"catalogue: {catalogue.num_items} items, {trie.num_nodes} trie nodes, "
        f"{stored.zero_gain.mean():.1%} zero-gain tokens"
    )


def build_model(config: TrainConfig, ds: DsConfig, inputs: Inputs) -> torch.nn.Module:
    """Build the model with the same random weights and LoRA matrices on every rank."""
    whole = config.load_in_4bit or bool(config.lora_r and inputs.added_ids)
    with loading_context(ds, whole):
        torch.manual_seed(config.seed)
        return inputs.backbone.build(
            config,
            inputs.model_config,
            dtype_of(ds),
            distributed.device(),
            inputs.added_ids,
            config.seed,
        )


if __name__ == "__main__":
    distributed.run(main)
