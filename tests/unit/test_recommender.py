"""The Python API, compared with a plain search: lists, filters, guidance, batches, errors."""

import contextlib
import dataclasses
import gc
import itertools
import math
import shutil
import weakref

import numpy as np
import pytest
import tiny_run
import transformers
import yaml
from oracle import (
    SCORE_ATOL,
    SCORE_RTOL,
    assert_same_lists,
    plain_search,
    ranking,
    weight_by_path,
)
from pretend_device import pretend_device
from tiny_run import TITLES, Plain

from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.contracts import Likelihood
from igd_ds.errors import UsageError
from igd_ds.evaluation.recommender import Recommender
from igd_ds.search.scoring import edge_weights

HISTORIES = [[1, 2], [0], [7, 7, 3, 9, 4], [5, 6], [8], [2, 4], [9, 1, 0]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module", params=["cpu", "pretend"])
def recommender(run, request):
    with contextlib.nullcontext() if request.param == "cpu" else pretend_device():
        yield Recommender.load(run, device=request.param)


@pytest.fixture(scope="module")
def plain(run):
    return Plain(run)


def as_paths(plain, ranked):
    """Return a RankedList as [(score, path)]."""
    return [(r.score, plain.paths[r.item_ids[0]]) for r in ranked]


def leaves(lists):
    """Return the items of each leaf of each list."""
    return [[r.item_ids for r in ranked] for ranked in lists]


def items(lists):
    """Return the items of each list, ascending."""
    return [sorted(item for r in ranked for item in r.item_ids) for ranked in lists]


def test_three_lines(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    recommender = Recommender.load("run")
    for recommendation in recommender.recommend([[3, 7, 5]], k=5, alpha=0.2)[0]:
        print(recommendation.rank, recommendation.title, recommendation.score)

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert {line[1] for line in lines} < set(TITLES)
    scores = [float(line[2]) for line in lines]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("search", ["beam", "exact"])
def test_lists_equal_a_plain_search(recommender, plain, search, length_penalty):
    weight = weight_by_path(plain.trie, edge_weights(plain.trie, plain.gain, "per-node", 0.3))
    arguments = {"k": 3, "alpha": 0.3, "length_penalty": length_penalty}
    lists = recommender.recommend(HISTORIES, search=search, **arguments)

    for history, ranked in zip(HISTORIES, lists, strict=True):
        model, prompt, paths = plain.model, plain.prompt(history), plain.different_paths
        if search == "beam":
            expected = plain_search(model, prompt, paths, weight, 3, length_penalty)
        else:
            expected = ranking(model, prompt, paths, weight, length_penalty)[:3]
        assert_same_lists(as_paths(plain, ranked), expected)
        assert [r.rank for r in ranked] == [1, 2, 3]
        assert not ranked.short
        assert all(r.title == TITLES[r.item_ids[0]] for r in ranked)
        assert all(r.certified == (search == "exact") for r in ranked)


def test_recommendations_cannot_be_changed(recommender):
    ((first,),) = recommender.recommend([[1]], k=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.rank = 2


def test_exact_lists_are_never_worse(recommender):
    beam = recommender.recommend(HISTORIES, k=2, alpha=0.0, search="beam")
    exact = recommender.recommend(HISTORIES, k=2, alpha=0.0, search="exact")
    pairs = [
        (e.score, b.score)
        for ours, theirs in zip(exact, beam, strict=True)
        for e, b in zip(ours, theirs, strict=True)
    ]
    assert all(e >= b for e, b in pairs)
    assert any(e > b for e, b in pairs)


def test_lists_do_not_depend_on_the_batch(recommender, monkeypatch):
    allow = [None, [1, 2, 3], *[None] * 4, [0, 1, 5, 9]]
    deny = [[user] for user in range(len(HISTORIES))]
    together = recommender.recommend(HISTORIES, k=4, allow=allow, deny=deny)
    monkeypatch.setattr(recommender, "batch_size", 2)
    in_batches = recommender.recommend(HISTORIES, k=4, allow=allow, deny=deny)
    alone = [
        recommender.recommend([h], k=4, allow=[a], deny=[d])[0]
        for h, a, d in zip(HISTORIES, allow, deny, strict=True)
    ]
    assert leaves(together) == leaves(in_batches) == leaves(alone)

    # Matrix products of another shape add in another order.
    for ours, theirs in zip(together, alone, strict=True):
        expected = [r.score for r in theirs]
        assert [r.score for r in ours] == pytest.approx(expected, rel=SCORE_RTOL, abs=SCORE_ATOL)
    assert recommender.recommend([]) == []


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_filters(recommender, search):
    allow = [[4, 7, 9, 0], None, [2], None, None, None, [3, 2]]
    deny = [[0], [0, 1, 2, 9], None, [], None, list(range(2, 10)), None]
    lists = recommender.recommend(HISTORIES, k=6, search=search, allow=allow, deny=deny)
    found = items(lists)
    assert found[0] == [4, 7, 9]
    assert found[1] == [3, 4, 5, 6, 7, 8]
    assert found[2] == [2]
    assert found[5] == [0, 1]
    assert found[6] == [2, 3]
    assert len(lists[6]) == 1  # one leaf
    assert [ranked.short for ranked in lists] == [True, False, True, False, False, True, True]


def test_seen_items(recommender):
    denied = recommender.recommend(HISTORIES, k=4, deny=HISTORIES)
    assert leaves(recommender.recommend(HISTORIES, k=4, exclude_seen="yes")) == leaves(denied)
    kept = recommender.recommend(HISTORIES, k=4, exclude_seen="no")
    assert leaves(kept) == leaves(recommender.recommend(HISTORIES, k=4)) != leaves(denied), (
        "auto keeps them, because 1 of 12 training targets is a seen item"
    )
    both = recommender.recommend([[1, 2]], k=9, deny=[[5]], exclude_seen="yes")
    assert items(both) == [[0, 3, 4, 6, 7, 8, 9]]
    streamed = [found.item_ids for found in recommender.stream([1, 2], exclude_seen="yes")]
    assert sorted(sum(streamed, ())) == [0, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(UsageError, match="exclude_seen is one of auto, yes, no, found 'never'"):
        recommender.recommend([[1]], exclude_seen="never")


def test_a_history_is_cut_as_those_of_the_dataset_are(recommender, monkeypatch):
    """All of it counts as seen."""
    monkeypatch.setattr(recommender, "max_history", 2)
    (cut,) = recommender.recommend([[7, 0, 3, 9]], k=10, exclude_seen="no")
    (short,) = recommender.recommend([[3, 9]], k=10, exclude_seen="no")
    assert_same_lists([(r.score, r.item_ids) for r in cut], [(r.score, r.item_ids) for r in short])
    streamed = next(recommender.stream([7, 0, 3, 9], exclude_seen="no"))
    assert streamed == next(recommender.stream([3, 9], exclude_seen="no"))

    (unseen,) = recommender.recommend([[7, 0, 3, 9]], k=10, exclude_seen="yes")
    assert {7, 0, 3, 9}.isdisjoint(item for r in unseen for item in r.item_ids)


def test_more_than_the_catalogue_has(recommender):
    lists = recommender.recommend([[1]], k=10**9)
    assert lists[0].short
    assert items(lists) == [list(range(10))]


def test_guidance(recommender, monkeypatch):
    q = np.full((len(HISTORIES), 10), 1e-3)
    wanted = [8, 0, 5, 4, 7, 1, 6]
    q[np.arange(len(HISTORIES)), wanted] = 1
    monkeypatch.setattr(recommender, "batch_size", 3)
    strong = recommender.recommend(HISTORIES, k=3, guidance=(q, 100.0))
    assert [ranked[0].item_ids for ranked in strong] == [(item,) for item in wanted]

    free = recommender.recommend(HISTORIES, k=3)
    without_weight = recommender.recommend(HISTORIES, k=3, guidance=(q, 0.0))
    assert leaves(free) == leaves(without_weight) != leaves(strong)


def test_guidance_to_denied_items_leads_no_beam_astray(recommender):
    # The guide prefers the denied "abc". The only other item with its first two letters is "ab",
    # which the guide forbids.
    q = np.zeros((1, 10))
    q[0, 1], q[0, 4] = 1, 1e-3
    (ranked,) = recommender.recommend([[5]], k=1, deny=[[1]], guidance=(q, 5.0))
    assert [r.title for r in ranked] == ["bcc"]
    assert not ranked.short


def load_trained(run, folder, likelihood, device):
    """Load a copy of the run whose model was trained with this likelihood."""
    shutil.copytree(run / "model", folder / "model")
    tiny_run.set_likelihood(folder / "model", likelihood)
    return Recommender.load(folder / "model", dataset=run.parent / "data", device=device)


def test_auto_is_the_softmax_that_the_model_was_trained_with(run, recommender, plain, tmp_path):
    likelihood = {"softmax": "masked", "temperature": 2.0}
    trained = load_trained(run, tmp_path, likelihood, recommender.device)
    assert trained.likelihood == Likelihood("masked", 2.0)

    auto = trained.recommend(HISTORIES, k=5, alpha=0.0, search="exact")
    given = recommender.recommend(
        HISTORIES, k=5, alpha=0.0, search="exact", softmax="masked", temperature=2.0
    )
    assert auto == given  # the same computation
    for history, ranked in zip(HISTORIES, auto, strict=True):
        expected = plain.masked_ranking(plain.prompt(history), 2.0)[:5]
        assert_same_lists(as_paths(plain, ranked), expected)

    # Options override what the model was trained with.
    full = trained.recommend(HISTORIES, k=5, softmax="full", temperature=1.0)
    assert full == recommender.recommend(HISTORIES, k=5)


def test_lists_and_streams_have_probabilities_under_the_masked_softmax(recommender):
    masked = {"alpha": 0.0, "softmax": "masked"}
    everything = recommender.recommend(HISTORIES, k=1000, exclude_seen="no", **masked)
    for ranked in everything:
        assert all(place.certified for place in ranked)  # the search is exact by itself
        assert [place.probability for place in ranked] == pytest.approx(
            np.exp([place.score for place in ranked])
        )
        assert ranked.coverage == pytest.approx(1, rel=1e-6)

    # A batch of other users and another search order round otherwise.
    few = recommender.recommend(HISTORIES[:1], k=3, exclude_seen="no", **masked)[0]
    best = [place.probability for place in everything[0][:3]]
    assert few.coverage == pytest.approx(sum(best), rel=1e-5)
    streamed = recommender.stream(HISTORIES[0], exclude_seen="no", **masked)
    probabilities = [next(streamed).probability for _ in range(3)]
    assert probabilities == pytest.approx(best, rel=1e-5)

    # The items that are left keep their probabilities, or share all of it on request.
    denied = [few[0].item_ids]
    for renormalise, total in ((False, 1 - few[0].probability), (True, 1)):
        (rest,) = recommender.recommend(
            HISTORIES[:1], k=1000, deny=denied, ids="dense", renormalise=renormalise,
            exclude_seen="no", **masked,
        )  # fmt: skip
        assert rest.coverage == pytest.approx(total, rel=1e-5)

    # What weighs or adds makes scores of them.
    q = np.full((1, 10), 0.1)
    for other in ({"alpha": 0.2}, {"length_penalty": 1.0}, {"guidance": (q, 0.5)}):
        (ranked,) = recommender.recommend(HISTORIES[:1], k=3, **(masked | other))
        assert ranked.coverage is None and ranked[0].probability is None


def test_models_without_a_likelihood_have_the_full_softmax(run, recommender, tmp_path):
    older = load_trained(run, tmp_path, None, recommender.device)
    assert older.likelihood == Likelihood("full", 1.0)
    auto = older.recommend(HISTORIES, k=5)
    assert auto == recommender.recommend(HISTORIES, k=5, softmax="full", temperature=1.0)
    assert auto != recommender.recommend(HISTORIES, k=5, softmax="masked")


def test_the_run_may_be_named_by_its_model_folder(run, recommender):
    expected = leaves(recommender.recommend(HISTORIES[:2], k=3))
    assert leaves(Recommender.load(run / "model").recommend(HISTORIES[:2], k=3)) == expected


def test_the_dataset_may_move(run, recommender, tmp_path):
    expected = leaves(recommender.recommend(HISTORIES[:2], k=3))
    shutil.copytree(run / "model", tmp_path / "model")
    with pytest.raises(UsageError, match="no config.yaml in .* give dataset="):
        Recommender.load(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": "gone"}))
    with pytest.raises(UsageError, match="was trained on gone, which is not there"):
        Recommender.load(tmp_path / "model")

    moved = Recommender.load(tmp_path, dataset=run.parent / "data")
    assert leaves(moved.recommend(HISTORIES[:2], k=3)) == expected


def test_an_eos_that_tokenizer_and_catalogue_disagree_on(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    tokenizer.save_pretrained(tmp_path / "model")
    message = "end in token 256, but the tokenizer's EOS is 257 .'<stop>'.: undo"
    with pytest.raises(UsageError, match=message):
        Recommender.load(tmp_path, dataset=run.parent / "data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"histories": [[1], []]}, r"histories\[1\]: the history is empty"),
        (
            {"histories": [[1], [2], [3, 10]]},
            r"histories\[2\]: '10' is no source id of this dataset, and no dense item id",
        ),
        ({"histories": [[1], [-1]]}, r"histories\[1\]: '-1' is no source id"),
        ({"histories": [1, 2]}, r"histories\[0\]: need a flat list of item ids"),
        ({"histories": [["ab"]]}, r"histories\[0\]: 'ab' is no source id"),
        ({"histories": [[1]], "k": 0}, "k must be a whole number and at least 1, found 0"),
        ({"histories": [[1]], "alpha": 1.5}, "--alpha must lie in"),
        ({"histories": [[1]], "search": "best"}, "unknown search 'best'; known: beam, exact"),
        ({"histories": [[1]], "softmax": "half"}, "unknown --softmax 'half'"),
        (
            {"histories": [[1]], "search": "exact", "decoding_rule": "pooled"},
            "--decoding_rule pooled depends",
        ),
        (
            {"histories": [[1], [2]], "allow": [None]},
            "allow takes one entry per history: found 1 for 2",
        ),
        (
            {"histories": [[1]] * 20, "deny": [None] * 18 + [list(range(10)), None]},
            r"\(histories\[18\]\): nothing is left",
        ),
        (
            {"histories": [[1], [2]], "deny": [None, [11]]},
            r"deny\[1\]: '11' is no source id",
        ),
        (
            {"histories": [[1]], "guidance": (np.ones((1, 9)), 1.0)},
            "one row per user of 10 item scores",
        ),
        (
            {"histories": [[1]] * 2, "guidance": (np.eye(2, 10), 1.0), "deny": [None, [1]]},
            r"histories\[1\]: item filter and guid",
        ),
    ],
)
def test_bad_input_names_the_user(recommender, arguments, message):
    with pytest.raises(UsageError, match=message):
        recommender.recommend(**arguments)


def test_limits_and_precision_are_checked(run, recommender, monkeypatch):
    monkeypatch.setattr(recommender, "limits", Limits(pass_positions=4))
    message = "--pass_positions 4 is less than one position for each of 5 beams"
    with pytest.raises(UsageError, match=message):
        recommender.recommend([[1]], k=5)
    with pytest.raises(UsageError, match="found 'half-ish'"):
        Recommender.load(run, dtype="half-ish")


def test_the_arrays_of_equal_options_are_made_once(recommender):
    once = recommender.scoring(ScoringOptions(alpha=(0.1, 0.2)))
    assert recommender.scoring(ScoringOptions(alpha=(0.1, 0.2))) is once
    assert recommender.scoring(ScoringOptions(alpha=(0.1,))) is not once


def entries(recommendations):
    """Return items and scores."""
    return [(r.item_ids, r.score) for r in recommendations]


def test_a_stream_gives_the_exact_list_of_every_length(recommender):
    for history, alpha in ([0], 0.0), ([7, 7, 3, 9, 4], 0.4):
        streamed = list(recommender.stream(history, alpha=alpha))
        assert [r.rank for r in streamed] == list(range(1, recommender.num_leaves + 1))
        assert all(r.certified for r in streamed)
        for k in range(1, recommender.num_leaves + 1):
            (exact,) = recommender.recommend([history], k=k, alpha=alpha, search="exact")
            assert [(r.item_ids, r.title) for r in streamed[:k]] == [
                (r.item_ids, r.title) for r in exact
            ]
            # Other runs share a pass, and matrix products of another shape add in another order.
            assert [r.score for r in streamed[:k]] == pytest.approx(
                [r.score for r in exact], rel=SCORE_RTOL, abs=SCORE_ATOL
            )


def test_a_streams_bound_holds_for_all_that_follows(recommender):
    found = list(recommender.stream(HISTORIES[2]))
    for ours, following in itertools.pairwise(found):
        assert following.score <= ours.bound <= ours.score
    assert found[-1].bound == -math.inf


def test_a_stream_that_is_left_leaves_nothing_behind(recommender):
    implementation = recommender.model.config._attn_implementation
    before = recommender.recommend(HISTORIES, k=3, search="exact")
    stream = recommender.stream(HISTORIES[0])
    next(stream)

    # In the middle of a stream: other searches run, also another stream of the same user.
    assert recommender.model.config._attn_implementation == implementation
    assert recommender.recommend(HISTORIES, k=3, search="exact") == before
    assert entries(recommender.stream(HISTORIES[0])) == entries(
        [*itertools.islice(recommender.stream(HISTORIES[0]), 1), *stream]
    )

    left = recommender.stream(HISTORIES[1])
    next(left)
    frontier = weakref.ref(left.gi_frame.f_locals["passes"].gi_frame.f_locals["frontier"])
    del left
    gc.collect()
    assert frontier() is None
    assert recommender.recommend(HISTORIES, k=3, search="exact") == before


def test_a_stream_reads_no_more_than_is_taken(recommender):
    sent = []
    handle = recommender.model.register_forward_pre_hook(
        lambda _, args, kwargs: sent.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    stream = recommender.stream(HISTORIES[2])
    assert sent == []
    next(stream)
    first = sum(sent)
    list(stream)
    everything = sum(sent)
    handle.remove()
    assert first < everything


def test_positions_end_a_stream_with_what_is_proven(recommender):
    everything = entries(recommender.stream(HISTORIES[2]))
    lengths = []
    for positions in (1, 2, 4, 8, 10**6):
        some = entries(recommender.stream(HISTORIES[2], positions=positions))
        assert [item for item, _ in some] == [item for item, _ in everything[: len(some)]]
        lengths.append(len(some))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == len(everything)


def test_a_filtered_stream_ends_with_the_last_allowed_item(recommender):
    assert items([recommender.stream([0], allow=[4, 7, 9, 0], deny=[0])]) == [[4, 7, 9]]
    assert items([recommender.stream([0], deny=range(1, 10))]) == [[0]]
    shared = list(recommender.stream([9], allow=[2, 3]))
    assert entries(shared)[0][0] == (2, 3) and shared[0].bound == -math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoding_rule": "pooled"}, 'pooled depends .* use recommend\\(search="beam"\\)'),
        ({"positions": 0}, "positions must be at least 1"),
        ({"history": []}, "the history is empty"),
        ({"history": [99]}, "histories\\[0\\]"),
        ({"deny": list(range(10))}, "nothing is left"),
        ({"allow": [99]}, "allow\\[0\\]"),
        ({"alpha": 2.0}, "--alpha must lie"),
        ({"ids": "number"}, "ids is one of"),
    ],
)
def test_a_stream_refuses_before_it_begins(recommender, arguments, message):
    with pytest.raises(UsageError, match=message):
        recommender.stream(**({"history": [1]} | arguments))
