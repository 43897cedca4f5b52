"""Whether a training fits on its GPUs and how long it takes, from shapes alone.

Nothing is measured on a GPU and no weight is loaded. The model is built on torch's meta device and
runs one forward pass there, so what autograd keeps for the backward pass is counted and not
guessed. What ZeRO keeps follows from DeepSpeed's code (0.19). All sizes are bytes of one GPU.

Letters: P parameters, T trained ones, R ranks, N tokens of a micro-batch, n labelled ones, V
vocabulary, b bytes of a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, DynamicCache

from igd_ds.backbones import lora, vocabulary
from igd_ds.backbones.capabilities import forward_arguments, model_without_weights
from igd_ds.engine.ds_config import DsConfig, dtype_of, zero_stage
from igd_ds.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from igd_ds.train_config import TrainConfig
    from igd_ds.training_inputs import Inputs

GIB = 2**30
ATTENTION = "igd_plan"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a quantised weight: 4 bits, one byte of scale per 64 weights, and one float32 per 256
scales (double quantisation)."""
GRADIENTS_AT_ONCE = 3
"""Gradients of the widest activation that live at the same time in a backward pass: of a gated
feed-forward layer those of its product and of both factors."""
RESERVED = GIB
"""CUDA's context, NCCL's buffers and fragmentation: an assumption."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    memory: float
    """Usable memory in GiB, as its driver reports it."""
    tflops: float
    """Dense peak in bf16 (fp16 where there is no bf16), 10^12 operations a second: data sheets."""


GPUS = {
    "T4": Gpu(14.6, 65),
    "V100-32GB": Gpu(31.7, 125),
    "A10G": Gpu(22.2, 70),
    "RTX3090": Gpu(23.7, 71),
    "A100-40GB": Gpu(39.4, 312),
    "A100-80GB": Gpu(79.2, 312),
    "L4": Gpu(22.2, 121),
    "RTX4090": Gpu(23.6, 165),
    "L40S": Gpu(44.4, 362),
    "H100": Gpu(79.1, 989),
    "H200": Gpu(139.8, 989),
    "B200": Gpu(178.3, 2250),
    "MI300X": Gpu(191.7, 1307),
}


def find_gpu(name: str) -> Gpu:
    """Return a row of `GPUS`; upper and lower case are the same.

    Raises:
        UsageError: there is none of this name.
    """
    known = {gpu.lower(): gpu for gpu in GPUS}
    if name.lower() not in known:
        near = did_you_mean(name.lower(), known)
        for lower, gpu in known.items():
            near = near.replace(f"'{lower}'", f"'{gpu}'")
        raise UsageError(f"--gpu: no GPU '{name}'{near} (known: {', '.join(GPUS)})")
    return GPUS[known[name.lower()]]


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of an epoch."""

    rows: int
    tokens: int
    """Tokens that the model reads, padding included."""
    labels: int
    """Labelled tokens."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass on the meta device shows."""

    vocabulary: int
    """V."""
    labels: int
    """n."""
    parameters: int
    """P."""
    trained: int
    """T."""
    weights: float
    """Bytes of all weights, whole."""
    largest: float
    """Bytes of the weights of the largest module, which ZeRO-3 gathers."""
    unpacked: int
    """Bytes of the largest quantised weight, unpacked as each product with it needs it."""
    activations: int
    """Bytes that autograd keeps."""
    recomputed: int
    """Bytes that it keeps with gradient checkpointing: inputs of layers, and what is outside."""
    layer: int
    """Bytes that it keeps of the largest layer."""
    widest: int
    """Bytes of the largest activation."""
    flops: float
    """Operations of the forward pass, attention scores not counted."""
    attention_width: int
    """Σ over attentions of query width + value width, all heads."""


# ---- the pass on the meta device


class _Attention(torch.autograd.Function):
    """Attention as a fused kernel: it keeps queries, keys, values, output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        batch, heads, length, _ = query.shape
        output = value.new_empty((batch, length, heads, value.shape[3]))
        logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        raise AssertionError("a plan makes no backward pass")


def plan_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
) -> tuple[Any, None]:
    """Stand for an attention kernel in a pass on the meta device; registered with transformers."""
    module.attention_width = query.shape[1] * (query.shape[3] + value.shape[3])
    return _Attention.apply(query, key, value), None


AttentionInterface.register(ATTENTION, plan_attention)


class _Kept:
    """Counts the bytes that autograd keeps, each storage once and no parameters."""

    def __init__(self, model: torch.nn.Module):
        self.total = self.inputs = self.widest = 0
        self.by_layer: list[int] = []
        self._is_inside = False
        self._seen = {_storage(parameter) for parameter in model.parameters()}
        self._seen |= {_storage(buffer) for buffer in model.buffers()}
        for layer in _layers(model):
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take note of a tensor. It stays alive, or another one could get its storage's address."""
        if _storage(tensor) not in self._seen:
            self._seen.add(_storage(tensor))
            size = tensor.untyped_storage().nbytes()
            self.total += size
            self.widest = max(self.widest, size)
            if self._is_inside:
                self.by_layer[-1] += size
        return tensor

    def _enter(self, module: Any, arguments: Any, keywords: Any) -> None:
        states = arguments[0] if arguments else keywords["hidden_states"]
        self.inputs += _bytes(states)
        self.by_layer.append(0)
        self._is_inside = True

    def _leave(self, module: Any, arguments: Any, output: Any) -> None:
        self._is_inside = False


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the layers that gradient checkpointing recomputes."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def build_on_meta(config: TrainConfig, inputs: Inputs, dtype: torch.dtype) -> Any:
    """Return the model that a training would build, on the meta device and ready for `trace`."""
    if inputs.model_config.is_encoder_decoder:
        from transformers import T5ForConditionalGeneration

        with torch.device("meta"):
            model: Any = T5ForConditionalGeneration(inputs.model_config)
    else:
        model = model_without_weights(inputs.model_config)

    base = model
    if inputs.added_ids:
        vocabulary.resize(model, inputs.added_ids.stop)
    model = model.to(dtype)
    if config.lora_r:
        unquantised = dataclasses.replace(config, load_in_4bit=False)
        model = lora.with_lora(model, unquantised, inputs.added_ids)
        model.enable_input_require_grads()
    if getattr(base, "_supports_attention_backend", False):
        base.config._attn_implementation = ATTENTION
    return model.to(dtype).train()


def trace(config: TrainConfig, inputs: Inputs, dtype: torch.dtype, batch: MicroBatch) -> Trace:
    """Run one forward pass of a micro-batch on the meta device and count."""
    model = build_on_meta(config, inputs, dtype)
    quantised = _linear_weights(model) if config.load_in_4bit else set()

    def size(parameter: torch.nn.Parameter) -> float:
        is_packed = id(parameter) in quantised
        return NF4_BYTES * parameter.numel() if is_packed else _bytes(parameter)

    kept = _Kept(model)
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor), counter:
        model(**_inputs_of(model, inputs, batch))

    parameters = list(model.parameters())
    layers = kept.by_layer or [kept.total]
    return Trace(
        vocabulary=model.get_output_embeddings().weight.shape[0],
        labels=batch.labels,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        weights=sum(map(size, parameters)),
        largest=max(sum(map(size, m.parameters(recurse=False))) for m in model.modules()),
        unpacked=max((_bytes(p) for p in parameters if id(p) in quantised), default=0),
        activations=kept.total,
        recomputed=kept.total - sum(kept.by_layer) + kept.inputs,
        layer=max(layers),
        widest=kept.widest,
        flops=float(counter.get_total_flops()),
        attention_width=sum(getattr(m, "attention_width", 0) for m in model.modules()),
    )


def _linear_weights(model: Any) -> set[int]:
    """Return the identities of the weights that are quantised: those of inner linear layers."""
    output = model.get_output_embeddings()
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
        and module is not output
        and not module.weight.requires_grad
    }


def _inputs_of(model: Any, inputs: Inputs, batch: MicroBatch) -> dict[str, Any]:
    """Return the arguments of a forward pass over a micro-batch: all tokens as one row."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    if inputs.model_config.is_encoder_decoder:
        prompt = -(-(batch.tokens - batch.labels) // batch.rows)
        item = -(-batch.labels // batch.rows)
        return {
            "input_ids": zeros(batch.rows, prompt),
            "decoder_input_ids": zeros(batch.rows, item),
            "use_cache": False,
        }
    arguments: dict[str, Any] = {"input_ids": zeros(1, batch.tokens), "use_cache": False}
    if "logits_to_keep" in forward_arguments(model):
        arguments["logits_to_keep"] = torch.arange(batch.labels, device="meta")
    return arguments


def cache_bytes_per_token(inputs: Inputs, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that the search keeps of a token, all layers.

    Of an encoder-decoder it is what the decoder keeps, as much for each prompt token as for each
    token of a hypothesis.
    """
    config = inputs.model_config
    if config.is_encoder_decoder:
        return 2 * config.num_decoder_layers * config.num_heads * config.d_kv * dtype.itemsize

    model = model_without_weights(config).to(dtype)
    length, cache = 4, DynamicCache()
    with torch.no_grad():
        ids = torch.zeros((1, length), dtype=torch.int64, device="meta")
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    states = (state for layer in cache.layers for state in (layer.keys, layer.values))
    return sum(map(_bytes, states)) // length


# ---- time


def flops_per_token(found: Trace, config: TrainConfig, batch: MicroBatch, context: float) -> float:
    """Return the operations of a training step per token that the model reads.

    A backward pass costs two forward passes, or one where hardly any weight is trained (LoRA);
    gradient checkpointing adds one.

    Args:
        found: the trace of `batch`.
        config: settings of the training.
        batch: the micro-batch that was traced.
        context: mean number of tokens that a token attends to.
    """
    forward = found.flops / batch.tokens + 2 * context * found.attention_width
    passes = (2 if config.lora_r else 3) + config.gradient_checkpointing
    return forward * passes


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    """Weights in fp32 and AdamW's two moments."""
    buffers: float
    """DeepSpeed's communication buffers; at stage 3 the weights that are gathered at a time."""
    activations: float
    logits: float
    """Logits at labelled positions with their log-probabilities and gradients."""
    backward: float
    """Gradients of activations; with checkpointing also the activations of one layer."""
    update: float
    """Gradients in fp32, made when the weights are updated."""
    host: float = 0.0
    """Bytes in CPU memory, per rank (offload)."""

    @property
    def states(self) -> float:
        """What stays from step to step, and the buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def peak(self) -> float:
        """The most that is needed at once: in the backward pass or in the update."""
        in_pass = self.activations + max(self.logits, self.backward)
        return self.states + max(in_pass, self.update)


def memory(config: TrainConfig, ds: DsConfig, ranks: int, found: Trace) -> Memory:
    """Estimate the memory of a training.

    Args:
        config: settings of the training.
        ds: the resolved DeepSpeed configuration.
        ranks: R.
        found: the trace of its largest micro-batch.
    """
    stage, zero, share = zero_stage(ds), ds["zero_optimization"], 1 / ranks
    b, trained = dtype_of(ds).itemsize, found.trained
    offloads = {key: _offloads(ds, key) for key in ("offload_optimizer", "offload_param")}

    # What ZeRO keeps, and what it shares out among the ranks.
    accumulates_fp32 = b == 4 or ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    weights = found.weights * (share if stage == 3 else 1)
    gradients = trained * (4 if accumulates_fp32 else b) * (share if stage >= 2 else 1)
    optimizer = trained * (12 * share if stage else 8)
    update = trained * 4 * share if stage else 0.0

    # Communication. Stage 1 sends gradients as they are accumulated, the others as weights are.
    bucket = zero.get("reduce_bucket_size", 5e8) * b
    buffers = 0.0
    if stage == 1 and accumulates_fp32:
        bucket *= 4 / b
    if stage in (1, 2):
        buffers = bucket * (2 if zero.get("overlap_comm") else 1)
    elif stage == 3:
        live = min(zero.get("stage3_max_live_parameters", 1e9) * b, found.weights)
        buffers = max(live, found.largest) + bucket

    host = 0.0
    if offloads["offload_optimizer"]:
        host += optimizer + update
        optimizer = update = 0.0
        if stage >= 2:
            gradients = 0.0  # they leave the GPU bucket by bucket
    if offloads["offload_param"] and stage == 3:
        host += weights
        weights = 0.0

    # The passes.
    backward: float = GRADIENTS_AT_ONCE * found.widest
    if config.load_in_4bit:
        backward += found.unpacked
    activations = found.activations
    if config.gradient_checkpointing:
        activations = found.recomputed
        backward += found.layer
    per_logit = 8 if b == 4 else 2 * b + 6
    logits = per_logit * found.labels * found.vocabulary

    parts = (weights, gradients, optimizer, buffers, activations, logits, backward, update, host)
    return Memory(*map(float, parts))


def _offloads(ds: DsConfig, key: str) -> bool:
    device = (ds["zero_optimization"].get(key) or {}).get("device", "none")
    return str(device) != "none"
