"""Memory and time of a training from shapes: by hand, and against DeepSpeed's own estimators."""

import dataclasses

import pytest
import torch
import transformers

from igd_ds import planning
from igd_ds.engine.ds_config import DsConfig, dtype_of
from igd_ds.errors import UsageError
from igd_ds.planning import (
    GPUS,
    NF4_BYTES,
    Memory,
    MicroBatch,
    Trace,
    find_gpu,
    flops_per_token,
    memory,
    trace,
)
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import Inputs

WIDTH, INNER, LAYERS, VOCABULARY = 64, 160, 3, 500
BATCH = MicroBatch(rows=4, tokens=120, labels=20)


def config(**settings) -> TrainConfig:
    named = {"ds_config": "", "dataset": "", "output_dir": "", "model_name_or_path": "m"}
    return TrainConfig(**named | settings)


def inputs(**sizes) -> Inputs:
    """Return what a plan needs to know of a Qwen2."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    } | sizes
    model = transformers.Qwen2Config(**shape)
    return Inputs(None, None, None, range(0), model, None)


def ds(stage: int, precision: str = "bf16", **zero) -> DsConfig:
    small = {"reduce_bucket_size": 0, "overlap_comm": False, "stage3_max_live_parameters": 0}
    return {precision: {"enabled": True}, "zero_optimization": {"stage": stage} | small | zero}


def planned(ds: DsConfig, ranks: int, of: Inputs | None = None) -> tuple[Memory, Trace]:
    """Return the memory of a training of all weights, and its trace."""
    found = trace(config(), of or inputs(), dtype_of(ds), BATCH)
    return memory(config(), ds, ranks, found), found


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_gpu_is_found_in_any_case():
    assert find_gpu("h100") == GPUS["H100"] and find_gpu("A100-80gb") == GPUS["A100-80GB"]
    with pytest.raises(UsageError, match=r"--gpu: no GPU 'H10', did you mean 'H100'\? \(known: T4"):
        find_gpu("H10")


def test_a_trace_counts_parameters_and_operations():
    found = trace(config(), inputs(), torch.bfloat16, BATCH)
    kv = WIDTH // 2
    linear = LAYERS * (WIDTH * (2 * WIDTH + 2 * kv) + 3 * WIDTH * INNER)
    biases, norms = LAYERS * (WIDTH + 2 * kv), (2 * LAYERS + 1) * WIDTH
    assert found.parameters == found.trained == 2 * VOCABULARY * WIDTH + linear + biases + norms
    assert found.weights == 2 * found.parameters
    assert found.largest == 2 * VOCABULARY * WIDTH and found.vocabulary == VOCABULARY
    output = BATCH.labels * VOCABULARY * WIDTH
    assert found.flops == 2 * (BATCH.tokens * linear + output)
    assert found.attention_width == LAYERS * 2 * WIDTH

    # Two products with 30 tokens each; the backward pass costs twice the forward pass.
    forward = found.flops / BATCH.tokens + 2 * 30 * found.attention_width
    assert flops_per_token(found, config(), BATCH, 30) == 3 * forward
    checkpointed = config(gradient_checkpointing=True, lora_r=4)
    assert flops_per_token(found, checkpointed, BATCH, 30) == 3 * forward


def test_activations_are_those_that_autograd_keeps():
    """A real model on a CPU keeps the same bytes; its attention kernel may keep a few more."""
    found = trace(config(), inputs(), torch.float32, BATCH)
    model = transformers.Qwen2ForCausalLM(inputs().model_config).train()
    kept = planning._Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        ids = torch.zeros((1, BATCH.tokens), dtype=torch.int64)
        model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(BATCH.labels))
    assert found.activations == pytest.approx(kept.total, rel=0.05)
    assert found.widest == kept.widest == 4 * BATCH.tokens * INNER

    # With checkpointing: the input of each layer, and what lies outside of the layers.
    states = 4 * BATCH.tokens * WIDTH
    assert LAYERS * states < found.recomputed < (LAYERS + 3) * states
    half = trace(config(), inputs(), torch.float32, MicroBatch(2, 60, 10))
    assert half.activations == pytest.approx(found.activations / 2, rel=0.01)


def test_adapters_and_quantised_weights():
    found = trace(config(lora_r=4), inputs(), torch.bfloat16, BATCH)
    kv = WIDTH // 2
    pairs = [(WIDTH, WIDTH), (WIDTH, kv), (WIDTH, kv), (WIDTH, WIDTH)]
    pairs += [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    assert found.trained == LAYERS * 4 * sum(a + b for a, b in pairs)
    quantised = trace(config(lora_r=4, load_in_4bit=True), inputs(), torch.bfloat16, BATCH)
    linear = LAYERS * sum(a * b for a, b in pairs)
    assert found.unpacked == 0 and quantised.unpacked == 2 * WIDTH * INNER
    assert found.weights - quantised.weights == pytest.approx((2 - NF4_BYTES) * linear)


def test_the_bytes_of_a_quantised_weight():
    import bitsandbytes

    weight = torch.randn(512, 1024)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    used = size_of([packed, state.absmax, state.state2.absmax])
    assert used / weight.numel() == pytest.approx(NF4_BYTES, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zero_2_needs_what_deepspeed_estimates(ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    found, traced = planned(ds(2), ranks)
    _, on_gpu = estimate_zero2_model_states_mem_needs(traced.parameters, ranks, 1, False)
    assert found.states + found.update == pytest.approx(on_gpu, rel=1e-4)

    offloaded, _ = planned(ds(2, offload_optimizer={"device": "cpu"}), ranks)
    on_cpu, on_gpu = estimate_zero2_model_states_mem_needs(
        traced.parameters, ranks, 1, True, additional_buffer_factor=1.0
    )
    assert offloaded.states == pytest.approx(on_gpu, rel=1e-4)
    assert ranks * offloaded.host == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("offload", [False, True])
def test_zero_3_needs_what_deepspeed_estimates(ranks, offload):
    """Within 15 %: DeepSpeed counts the largest module twice, and no weights in 16 bits."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    deep = inputs(num_hidden_layers=24)
    zero = {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param") if offload}
    found, traced = planned(ds(3, **zero), ranks, deep)
    largest = int(traced.largest / 2)
    on_cpu, on_gpu, gathered = estimate_zero3_model_states_mem_needs(
        traced.parameters, largest, ranks, 1, offload, offload, additional_buffer_factor=1.0
    )
    if offload:
        assert found.states == found.buffers == gathered / 2 and on_gpu == gathered
        assert ranks * found.host == pytest.approx(on_cpu, rel=0.15)
    else:
        assert found.states + found.update == pytest.approx(on_gpu, rel=0.15)


def test_the_peak_is_in_the_backward_pass_or_in_the_update():
    found, _ = planned(ds(1, "fp32"), 1)
    parts = dataclasses.asdict(found)
    assert found.states == sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    assert found.logits == 8 * BATCH.labels * VOCABULARY
    in_pass = found.activations + max(found.logits, found.backward)
    assert found.peak == found.states + max(in_pass, found.update)
    assert dataclasses.replace(found, update=1e9).peak == found.states + 1e9

    half, _ = planned(ds(1), 1)
    assert half.logits == 10 * BATCH.labels * VOCABULARY


def test_buckets_count_twice_where_communication_overlaps():
    zero = {"reduce_bucket_size": 1_000_000}
    plain, _ = planned(ds(2, **zero), 2)
    overlapped, _ = planned(ds(2, **zero, overlap_comm=True), 2)
    assert plain.buffers == 2e6 and overlapped.buffers == 4e6


def test_stage_1_sends_gradients_as_they_are_accumulated():
    settings = ds(1, reduce_bucket_size=1_000_000)
    assert planned(settings, 2)[0].buffers == 2e6
    in_fp32 = settings | {"data_types": {"grad_accum_dtype": "fp32"}}
    found, traced = planned(in_fp32, 2)
    assert found.buffers == 4e6 and found.gradients == 4 * traced.trained


def test_the_cache_of_a_search():
    per_token = planning.cache_bytes_per_token(inputs(), torch.bfloat16)
    assert per_token == 2 * LAYERS * (WIDTH // 2) * 2
