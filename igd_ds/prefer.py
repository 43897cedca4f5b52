"""Train a trained recommender further on preferences between items. Entry point of `igd prefer`.

    deepspeed igd_ds/prefer.py --ds_config ds_configs/zero2.json --dataset DATASET --model RUN \\
        --objective s-dpo --negatives sibling --num_negatives 5 --output_dir RUN2

Parse → trained model, catalogue, reference → model → engine → pairs of items with the reference's
log-probabilities (or, with --objective grpo, groups of items that each step searches) → the loop
(igd_ds/loop.py) → RUN2/model, which everything takes that takes RUN.
"""

import json
import shutil
import signal
from pathlib import Path

from igd_ds.errors import EXIT_REQUEUE, end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

import transformers

from igd_ds import distributed, locks, loop
from igd_ds.backbones.saved import BASE_FILE
from igd_ds.config.options import parse
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, keep_log
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, resolve_ds_config
from igd_ds.evaluation.model_card import write_model_card
from igd_ds.prefer_config import GRPO, PreferConfig
from igd_ds.preference.policy import PolicyTraining
from igd_ds.preference.start import Start, load_start
from igd_ds.preference.training import PreferenceTraining
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.training_inputs import build_model, record_base


def main() -> int:
    """Run a preference training from the command line; return the exit code."""
    config = parse(PreferConfig, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    distributed.init(config.timeout, config.master_port, config.quiet)
    start = load_start(config)
    ds = resolve_ds_config(config, distributed.world_size(), start.options.load_in_4bit)

    # Claim the run folder; a finished run is left as it is.
    run = Path(config.output_dir)
    tag, finished = distributed.on_main(lambda: open_run_folder(run, config, ds, start))
    if finished:
        say(f"{run} is finished: {finished}")
        return 0

    # Build what is trained, then go on from the newest checkpoint or begin.
    kind = PolicyTraining if config.objective == GRPO else PreferenceTraining
    training = kind(config, run, start, ds)
    distributed.on_main(lambda: training.claim(tag is not None))
    keep_log(run)
    model = build_model(start.options, config.seed, ds, start.inputs)
    engine = initialize(model, config, ds, training.total_steps)
    loop.say_header(engine, training, config, ds)
    lora, dataset = bool(start.options.lora_r), start.inputs.dataset.fingerprint
    state = loop.resume(engine, training, run, tag, dataset, lora)

    if tag is None:
        state.validated = -1  # the model at the start is validated too: it may stay the best

    # What is prepared in parts lies on the disk, so a stop meanwhile needs no care.
    locks.end_at(signal.SIGUSR1, EXIT_REQUEUE)
    locks.end_at(signal.SIGTERM, 128 + signal.SIGTERM)
    training.begin(engine, state.step)
    code = loop.fit(engine, training, config, run, state, loop.StopRequest(), lora)
    if code == 0:
        # The best validation is known now.
        distributed.on_main(lambda: write_model_card(run, run / "model"))
    return code


def open_run_folder(
    run: Path, config: PreferConfig, ds: DsConfig, start: Start
) -> tuple[str | None, str]:
    """Claim the run folder. Rank 0 only.

    Returns:
        The checkpoint to go on from, or None, and the summary of a finished run, else "".
    """
    claim_run_folder(run, config, ds, distributed.world_size())
    if summary := read_summary(run):
        return None, json.dumps(summary, indent=2, sort_keys=True)

    tag = newest_checkpoint(run / "checkpoints", config.trust_checkpoint)
    inputs, origin = start.inputs, start.inputs.origin
    trained = inputs.backbone.num_trained_parameters(
        inputs.model_config, start.options, inputs.added_ids
    )
    check_disk_space(run, trained, config.keep_checkpoints)
    if not (run / "catalogue").is_dir():
        shutil.copytree(start.folder / "catalogue", run / "catalogue")
    assert origin is not None, "a trained model has weights"
    record_base(run / BASE_FILE, origin, bool(tag and start.options.lora_r))
    return tag, ""


if __name__ == "__main__":
    distributed.run(main)
