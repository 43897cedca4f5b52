"""The logits processor in `model.generate` against our own search."""

import pytest
import torch
from oracle import (
    EOS,
    VOCABULARY,
    assert_same_lists,
    build_trie,
    found_lists,
    left_pad,
    node_paths,
    random_items,
    random_prompts,
    random_weights,
    tiny_model,
)

from igd_ds.search.processor import IGDLogitsProcessor


def generate(model, prompts, processor, num_beams, length_penalty):
    """Call `model.generate` as the processor's docstring says; return per user [(score, path)]."""
    ids, mask = left_pad(prompts)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        do_sample=False,
        renormalize_logits=False,
        max_new_tokens=8,
        eos_token_id=EOS,
        pad_token_id=EOS,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=[processor],
    )

    lists = [[] for _ in prompts]
    scores, sequences = output.sequences_scores.tolist(), output.sequences.tolist()
    for i, (score, tokens) in enumerate(zip(scores, sequences, strict=True)):
        path = tokens[ids.shape[1] :]
        if score > -1e9:  # else it fills up a short list
            lists[i // num_beams].append((score, tuple(path[: path.index(EOS) + 1])))
    return lists


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("num_beams", [4, 9])
def test_generate_finds_what_our_search_finds(num_beams, length_penalty):
    model, prompts, trie = tiny_model(), random_prompts(3), build_trie(random_items(60))
    weights = random_weights(trie)
    processor = IGDLogitsProcessor(trie, weights, left_pad(prompts)[0].shape[1])
    expected = found_lists(model, prompts, trie, weights, num_beams, length_penalty)
    for _ in range(2):  # the second call finds nothing left over from the first
        lists = generate(model, prompts, processor, num_beams, length_penalty)
        for found, wanted in zip(lists, expected, strict=True):
            assert_same_lists(found, wanted)


def test_a_list_longer_than_the_catalogue_is_filled_with_flagged_scores():
    model, prompts, items = tiny_model(), random_prompts(2), random_items(5)
    trie = build_trie(items)
    processor = IGDLogitsProcessor(trie, random_weights(trie), left_pad(prompts)[0].shape[1])
    for found in generate(model, prompts, processor, 8, 0.0):
        assert sorted(path for _, path in found) == sorted(items)


def test_values_of_one_call():
    items = [(1, 2, EOS), (1, 3, EOS), (4, EOS)]
    trie = build_trie(items)
    weights = random_weights(trie)
    edge = {path: weights[node] for node, path in enumerate(node_paths(trie))}
    torch.manual_seed(0)
    scores = torch.randn(4, VOCABULARY)
    prompt = [9, 9]
    # On the way, at the root's other child, outside the trie, and with a token that no item holds.
    rows = torch.tensor([[*prompt, 1], [*prompt, 4], [*prompt, 2], [*prompt, VOCABULARY - 1]])
    result = IGDLogitsProcessor(trie, weights, 2)(rows, scores)
    expected = torch.full_like(scores, -torch.inf)
    logprob = scores.log_softmax(-1)
    expected[0, 2], expected[0, 3] = edge[1, 2] * logprob[0, 2], edge[1, 3] * logprob[0, 3]
    expected[1, EOS] = edge[4, EOS] * logprob[1, EOS]
    torch.testing.assert_close(result, expected)
