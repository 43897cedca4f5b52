"""What backbones can do, what is refused before training, and text models of multimodal ones."""

import json

import pytest
import tokenizers
import torch
import transformers
from label_batch import label_batch

from igd_ds.backbones import T5, CausalLM, backbone_of, capabilities, read_model_config
from igd_ds.config.model import ModelOptions, ModelSource
from igd_ds.contracts import IGNORED, Capabilities
from igd_ds.errors import UsageError

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}
ALL = ("sdpa", "eager", "flash_attention_2")


def config_of(kind: str, **settings):
    return transformers.AutoConfig.for_model(kind, **SIZES | settings)


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>")
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("kind", "settings", "has_trees", "kernels"),
    [
        ("qwen2", {}, True, ALL),
        ("llama", {"pad_token_id": 0}, True, ALL),
        ("mistral", {"sliding_window": 4}, True, ALL),
        ("gemma2", {}, True, ("eager", "flash_attention_2")),  # torch's kernel has no soft-capping
        ("gemma3_text", {}, True, ALL),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, True, ("eager",)),  # sinks
        ("gpt2", {"pad_token_id": 0}, True, ALL),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}, True, ALL),
        ("bloom", {}, False, ("eager",)),
        ("mamba", {}, False, ("eager",)),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False, ALL),
        ("llama4_text", {"num_local_experts": 2}, False, ("sdpa", "eager")),  # attends by chunks
    ],
)
def test_capabilities_of_causal_models(kind, settings, has_trees, kernels):
    found = CausalLM().capabilities(config_of(kind, **settings))
    assert found == Capabilities(
        packed_training=has_trees, tree_search=has_trees, attention=kernels, adapters=True
    )


def test_capabilities_need_no_memory_and_are_kept(monkeypatch):
    """A configuration of 70 billion parameters, asked twice; the second has another vocabulary."""
    calls = []
    build = capabilities.model_without_weights
    monkeypatch.setattr(
        capabilities, "model_without_weights", lambda config: calls.append(config) or build(config)
    )
    large = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
    }
    first = CausalLM().capabilities(config_of("llama", **large))
    assert first.tree_search
    assert CausalLM().capabilities(config_of("llama", **large, vocab_size=50)) is first
    assert len(calls) == 1
    assert next(build(config_of("llama", **large)).parameters()).is_meta


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bloom", {}, "does not attend through AttentionInterface"),
        (
            "phimoe",
            {"sliding_window": 4, "num_local_experts": 2},
            "do not pass on their sliding windows",
        ),
        ("roberta", {"is_decoder": True}, "positions do not begin at 0"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of kind ['conv']"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "is_causal=False"),
    ],
)
def test_why_a_model_has_no_tree_is_said(kind, settings, reason, capsys):
    model = capabilities.model_without_weights(config_of(kind, **settings))
    assert not capabilities.reads_trees(model)
    said = capsys.readouterr().out
    assert "no tree search over" in said and reason in said


def test_what_a_backbone_is_for():
    assert isinstance(backbone_of(transformers.T5Config()), T5)
    assert isinstance(backbone_of(config_of("gemma3_text")), CausalLM)
    assert backbone_of(transformers.T5Config()).capabilities(transformers.T5Config()) == (
        Capabilities(
            packed_training=False, tree_search=True, attention=("sdpa", "eager"), adapters=False
        )
    )


@pytest.mark.parametrize(
    ("kind", "settings", "options", "message"),
    [
        ("gemma2", {}, {"attn_implementation": "sdpa"}, "--attn_implementation sdpa: models of "
         "type gemma2 do not have it; give eager or flash_attention_2"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1},
         {"attn_implementation": "flash_attention_2"},
         "--attn_implementation flash_attention_2: models of type gpt_oss .* give eager"),
        ("llama", {"max_position_embeddings": 64}, {"max_length": 65},
         "--max_length 65 exceeds the model's context of 64 tokens"),
        ("phi3", {"max_position_embeddings": 64, "original_max_position_embeddings": 32,
                  "pad_token_id": 0, "eos_token_id": 0, "rope_parameters": {
                      "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                      "long_factor": [2.0] * 4}}, {"max_length": 33},
         r"--max_length 33 exceeds 32 tokens, beyond which .*\(longrope\) change with the batch"),
        ("llama", {"vocab_size": 2}, {}, "3 tokens but the model at 'model' only 2"),
        ("vit", {}, {}, "no causal LM for models of type 'vit'"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before(kind, settings, options, message, tokenizer):
    options = ModelOptions(model_name_or_path="model", **options)
    with pytest.raises(UsageError, match=message):
        CausalLM().fit_model_config(config_of(kind, **settings), options, tokenizer, range(0))


@pytest.mark.parametrize(("kind", "kernel"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_auto_takes_the_best_attention_that_a_model_has(kind, kernel, tokenizer, tmp_path):
    config = config_of(kind)
    config.to_json_file(tmp_path / "config.json")
    options = ModelOptions(model_config=str(tmp_path / "config.json"), tokenizer="tokenizer")
    CausalLM().fit_model_config(config, options, tokenizer, range(0))
    model = CausalLM().build(options, config, torch.float32, torch.device("cpu"))
    assert model.config._attn_implementation == kernel


def test_adapters_need_linear_layers(tokenizer, monkeypatch):
    monkeypatch.setattr(
        CausalLM, "capabilities", lambda *_: Capabilities(False, False, ("sdpa",), adapters=False)
    )
    options = ModelOptions(model_name_or_path="model", lora_r=4)
    with pytest.raises(UsageError, match="--lora_r: 'model' has no linear layers"):
        CausalLM().fit_model_config(config_of("llama"), options, tokenizer, range(0))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gpt2", "mamba"])
def test_what_fits_is_built_trained_saved_loaded_and_searched(kind, tokenizer, tmp_path):
    """The whole way of a backbone; its attention kernel is the first of those it has."""
    backbone, model_config = CausalLM(), config_of(kind, num_hidden_layers=1)
    tokenizer.save_pretrained(tmp_path)
    options = ModelOptions(
        model_config="c",
        tokenizer="t",
        max_length=20,
        attn_implementation=backbone.capabilities(model_config).attention[0],
    )
    backbone.fit_model_config(model_config, options, tokenizer, range(0))
    model = backbone.build(options, model_config, torch.float32, CPU)
    assert backbone.num_trained_parameters(model_config, options) == sum(
        parameter.numel() for parameter in model.parameters()
    )

    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :6] = labels[1, :4] = IGNORED
    logits = backbone.label_logits(model.train(), label_batch(ids, torch.ones_like(ids), labels))
    torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.save_pretrained(tmp_path)
    source = ModelSource(model=str(tmp_path), dataset="")
    loaded = backbone.load(source, load_in_4bit=False, device=CPU)
    expected = model.eval()(ids).logits.log_softmax(-1)
    first = backbone.prompt_tree(loaded).prefill(list(ids.numpy())).log_softmax(-1)
    # Sums run in another order; the layer's fp32 rounding is a few 1e-7 of logits of size 5.
    torch.testing.assert_close(first, expected[:, -1], rtol=5e-6, atol=2e-5)


def test_a_model_that_makes_all_logits_returns_the_labelled_ones():
    """xLSTM has no logits_to_keep; a class without it stands in, as xLSTM needs a package."""

    class AllLogits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None, use_cache=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    model = transformers.AutoModelForCausalLM.from_config(config_of("llama")).eval()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = IGNORED
    batch = label_batch(ids, torch.ones_like(ids), labels)
    # The last layer's matrix product has another shape, so sums run in another order.
    torch.testing.assert_close(
        CausalLM().label_logits(AllLogits(model), batch), CausalLM().label_logits(model, batch)
    )


def multimodal(folder, kind: str):
    """Save a random Gemma 3 or LLaVA with a vision tower; return the model."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }

    if kind == "gemma3":
        text = SIZES | {"num_hidden_layers": 7, "sliding_window": 4}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = transformers.LlavaConfig(
            text_config=SIZES | {"model_type": "llama"},
            vision_config=vision | {"model_type": "clip_vision_model"},
        )
        model = transformers.LlavaForConditionalGeneration(config)

    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("kind", "text_type"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_the_text_model_of_a_multimodal_checkpoint(tmp_path, kind, text_type, tokenizer):
    whole = multimodal(tmp_path, kind)
    model_config = read_model_config(str(tmp_path))
    assert model_config.model_type == text_type and model_config.vocab_size == 40
    backbone = backbone_of(model_config)
    options = ModelOptions(model_name_or_path=str(tmp_path), max_length=20)
    backbone.fit_model_config(model_config, options, tokenizer, range(0))

    model = backbone.build(options, model_config, torch.float32, CPU)
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert backbone.num_trained_parameters(model_config, options) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, whole(ids).logits)
    expected = model(ids).logits[:, -1].log_softmax(-1)
    first = backbone.prompt_tree(model).prefill([ids[0].numpy()]).log_softmax(-1)
    torch.testing.assert_close(first, expected, rtol=5e-6, atol=2e-5)

    model.save_pretrained(tmp_path / "text")
    assert read_model_config(str(tmp_path / "text")).model_type == text_type


def test_an_adapter_on_a_multimodal_checkpoint(tmp_path, tokenizer):
    base = tmp_path / "base"
    multimodal(base, "gemma3")
    backbone, model_config = CausalLM(), read_model_config(str(base))
    options = ModelOptions(model_name_or_path=str(base), max_length=20, lora_r=2)
    backbone.fit_model_config(model_config, options, tokenizer, range(0))
    model = backbone.build(options, model_config, torch.float32, CPU)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")

    source = ModelSource(model=str(tmp_path / "model"), dataset="")
    loaded = backbone.load(source, load_in_4bit=False, device=CPU)
    ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(ids).logits[:, -1].log_softmax(-1)
    first = backbone.prompt_tree(loaded).prefill([ids[0].numpy()]).log_softmax(-1)
    torch.testing.assert_close(first, expected, rtol=5e-6, atol=2e-5)


def test_a_multimodal_checkpoint_without_its_text_is_refused(tmp_path):
    multimodal(tmp_path, "llava")
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    torch.save({"something.else": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="its weights lack .*save the text model alone"):
        CausalLM().load(ModelSource(model=str(tmp_path), dataset=""), False, CPU)


def base_model_of(kind: str, folder):
    """Save a model without the layer that predicts tokens, as an encoder of texts is published."""
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        )
        transformers.T5EncoderModel(config).save_pretrained(folder)
    else:
        transformers.AutoModel.from_config(config_of(kind)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("backbone", "kind", "lacks"), [(CausalLM(), "llama", "lm_head"), (T5(), "t5", "decoder")]
)
def test_weights_of_a_part_of_a_model_are_refused(backbone, kind, lacks, tmp_path):
    """Else the rest would be random, and the numbers quietly bad."""
    base_model_of(kind, tmp_path)
    message = f"its weights lack {lacks}.*would be random"
    with pytest.raises(UsageError, match=message):
        backbone.load(ModelSource(model=str(tmp_path), dataset=""), False, CPU)

    options = ModelOptions(model_name_or_path=str(tmp_path), attn_implementation="eager")
    config = read_model_config(str(tmp_path))
    with pytest.raises(UsageError, match=message):
        backbone.build(options, config, torch.float32, CPU)


def test_a_base_model_whose_head_is_its_embedding_is_whole(tmp_path):
    tied = config_of("llama", tie_word_embeddings=True)
    transformers.AutoModel.from_config(tied).save_pretrained(tmp_path)
    model = CausalLM().load(ModelSource(model=str(tmp_path), dataset=""), False, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lora_on_gpt2_counts_its_own_linear_layers():
    """GPT-2 calls its linear layers Conv1D; PEFT adapts them all, and not the output layer."""
    model_config = config_of("gpt2", num_hidden_layers=1)
    options = ModelOptions(model_name_or_path="gpt2", lora_r=2)
    inner = 4 * 16
    widths = (16 + 48) + (16 + 16) + (16 + inner) + (inner + 16)
    output = 16 + 40
    assert CausalLM().num_trained_parameters(model_config, options) == 2 * (widths + output)


def test_a_missing_configuration_is_bad_input(tmp_path):
    with pytest.raises(UsageError, match="no model configuration at"):
        read_model_config(str(tmp_path / "gone.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(UsageError, match="no model configuration at"):
        read_model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"model_type": "qwen2", "hidden_size": "x"}, "hidden_size"),
        ({"model_type": "qwen22"}, "no model_type 'qwen22', did you mean 'qwen2'?"),
        ({"model_type": ["qwen2"]}, "no model_type"),
        ([1], "holds no JSON object"),
        ({}, "model_type"),
    ],
)
def test_a_damaged_configuration_is_told_in_one_line(tmp_path, content, why):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    for name in (path, tmp_path):
        with pytest.raises(UsageError) as caught:
            read_model_config(str(name))
        message = str(caught.value)
        assert str(tmp_path) in message and why in message and "\n" not in message
