"""Train a recommender that writes the next item token by token. Entry point of `igd train`.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --objective igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → objective → model → engine → the loop (igd_ds/loop.py) → RUN/model.
"""

import json
from pathlib import Path

from igd_ds.errors import end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

import transformers

from igd_ds import distributed, loop
from igd_ds.backbones.saved import BASE_FILE
from igd_ds.config.options import parse
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, keep_log
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, resolve_ds_config
from igd_ds.evaluation.model_card import write_model_card
from igd_ds.generative_training import GenerativeTraining
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import Inputs, build_catalogue, build_model, load_inputs, record_base


def main() -> int:
    """Run a training from the command line; return the exit code."""
    config = parse(TrainConfig, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    distributed.init(config.timeout, config.master_port, config.quiet)
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
    code = loop.fit(engine, training, config, run, state, loop.StopRequest(), lora)
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


if __name__ == "__main__":
    distributed.run(main)
