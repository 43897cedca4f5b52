"""Train a recommender that writes the next item token by token. Entry point of `igd train`.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --objective igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → objective → model → engine → the loop (igd_ds/loop.py) → RUN/model.
"""

import json
import os
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igd_ds.errors import end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

import torch
import transformers

from igd_ds import distributed, loop
from igd_ds.backbones.saved import BASE_FILE
from igd_ds.config.options import from_arguments, parse
from igd_ds.data.dataset import InteractionDataset
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, keep_log
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, resolve_ds_config
from igd_ds.evaluation.model_card import write_model_card
from igd_ds.generative_training import GenerativeTraining
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import (
    Inputs,
    build_catalogue,
    build_model,
    content_of,
    load_inputs,
    record_base,
)


def main() -> int:
    """Run a training from the command line; return the exit code."""
    config = parse(TrainConfig, description=__doc__)
    distributed.init(config.timeout, config.master_port, config.quiet)
    return run_training(config)


def train(
    dataset: InteractionDataset | str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    objective: str = "igd",
    **settings: Any,
) -> Path:
    """Train in this process: `igd train` for scripts and notebooks, called as `igd_ds.train`.

    A second call with the same arguments goes on with a training that was interrupted, and returns
    the run of a finished one.

    Args:
        dataset: what `igd_ds.prepare` returns, or its folder.
        model: pretrained model (folder or hub name); or a model config (a file NAME.json) to train
            from random weights, which needs `tokenizer`.
        output: the run folder to make.
        objective: what the training minimises, a name in OBJECTIVES.
        settings: fields of TrainConfig, which are the flags of `igd train`. By default `ds_config`
            is "zero1" on a GPU and "zero0-fp32" on a CPU, and `resume` is "auto".

    Returns:
        The run folder, which `Recommender.load` and `igd_ds.evaluate` take.

    Raises:
        UsageError: an argument is unknown or has a wrong value, or what `igd train` refuses.
            Messages of `igd train` call `output` --output_dir.

    Example:
        >>> run = igd_ds.train(dataset, "HuggingFaceTB/SmolLM2-135M", "RUN", igd_beta=0.1)
        >>> recommender = igd_ds.Recommender.load(run)
    """
    source = "model_config" if str(model).endswith(".json") else "model_name_or_path"
    named = {
        "dataset": dataset.folder if isinstance(dataset, InteractionDataset) else dataset,
        source: model,
        "output_dir": output,
        "objective": objective,
    }
    defaults = {
        "ds_config": "zero1" if torch.cuda.is_available() else "zero0-fp32",
        "resume": "auto",
    }
    config = from_arguments(TrainConfig, named, defaults | settings, "igd_ds.train")
    with distributed.called_from_python(config.quiet):
        run_training(config, stop_signals=())
    return Path(output)


def run_training(
    config: TrainConfig, stop_signals: Sequence[signal.Signals] = loop.STOP_SIGNALS
) -> int:
    """Run a training from its settings; return the exit code.

    Args:
        config: the settings.
        stop_signals: what asks the training to save and end.
    """
    transformers.utils.logging.disable_progress_bar()
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
    keep_log(run)
    model = build_model(config, config.seed, ds, inputs)
    engine = initialize(model, config, ds, training.total_steps)
    loop.say_header(engine, training, config, ds)
    lora = bool(config.lora_r)
    state = loop.resume(engine, training, run, tag, inputs.dataset.fingerprint, lora)
    code = loop.fit(engine, training, config, run, state, loop.StopRequest(stop_signals), lora)
    if code == 0:
        # The best validation is known now.
        distributed.on_main(lambda: write_model_card(run, run / "model"))
    return code


def open_run_folder(
    run: Path, config: TrainConfig, ds: DsConfig, inputs: Inputs
) -> tuple[str | None, str]:
    """Claim the run folder. Rank 0 only.

    Returns:
        The checkpoint to go on from, or None, and the summary of a finished run, else "".
    """
    claim_run_folder(run, config, ds, distributed.world_size(), content_of(config, inputs))
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


class _CallableModule(types.ModuleType):
    """This module, called as the function `train`.

    Python binds an imported module to its package: `igd_ds.train` is this module, whatever else was
    there before.
    """

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    distributed.run(main)
