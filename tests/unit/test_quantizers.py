"""Quantizers, collisions and measures, against brute force on small data."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from igd_ds.errors import UsageError
from igd_ds.runlog import TAGS
from igd_ds.semantic_ids import collisions, kmeans, quantizers
from igd_ds.semantic_ids.collisions import resolve_collisions
from igd_ds.semantic_ids.quantizers import RQVAE, QuantizerOptions, fit

SMALL = QuantizerOptions(levels=3, codes=8, epochs=40, batch_size=64, hidden=(32, 16), latent=4)


def silent(step, values):
    assert set(values) <= set(TAGS)


def clusters(num_items=400, width=8, num_clusters=16, seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_clusters, width)) * 4
    vectors = centres[random.integers(num_clusters, size=num_items)] + 0.4 * random.normal(
        size=(num_items, width)
    )
    return (vectors + 3).astype(np.float32)


def squared_error(rows, centroids):
    return ((rows[:, None] - centroids[None]) ** 2).sum(2).min(1).sum()


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_the_best_partition(seed):
    random = np.random.default_rng(seed)
    centres = np.array([[0.0, 0], [9, 1], [1, 9]])
    rows = np.concatenate([centres[i] + random.normal(size=(3, 2)) for i in range(3)])
    best = np.inf
    for labels in product(range(3), repeat=8):
        labels = np.array([0, *labels])
        if len(set(labels)) == 3:
            best = min(
                best, squared_error(rows, np.stack([rows[labels == k].mean(0) for k in range(3)]))
            )
    found = kmeans.kmeans(torch.from_numpy(rows), 3, torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(squared_error(rows, found), best, rtol=1e-9)


def test_kmeans_ends_in_means_of_the_nearest_and_leaves_no_cluster_empty():
    rows = torch.from_numpy(clusters()).double()
    centroids = kmeans.kmeans(rows, 16, torch.Generator().manual_seed(1))
    codes = (rows[:, None] - centroids[None]).square().sum(2).argmin(1)
    assert torch.equal(codes, kmeans.nearest(rows, centroids))
    means = torch.stack(
        [rows[codes == k].mean(0) for k in range(16)]
    )  # NaN where a cluster is empty
    torch.testing.assert_close(centroids, means, rtol=1e-9, atol=1e-9)
    assert torch.equal(centroids, kmeans.kmeans(rows, 16, torch.Generator().manual_seed(1)))


def test_kmeans_of_fewer_different_rows_than_codes():
    rows = torch.tensor([[0.0, 1], [2, 3]]).repeat(5, 1)
    centroids = kmeans.kmeans(rows, 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(centroids).all() and squared_error(rows.numpy(), centroids.numpy()) == 0


def test_residual_kmeans_is_the_sum_of_its_codewords():
    vectors = clusters()
    result = fit("rq-kmeans", vectors, SMALL, silent)
    quantizer, codes = result.quantizer, result.codes
    assert codes.dtype == np.int32 and codes.shape == (400, 3)
    scaled = (vectors - vectors.mean(0)) / (vectors - vectors.mean(0)).std()
    books = quantizer.codebooks.numpy()
    residual = scaled
    for level in range(3):
        code = ((residual[:, None] - books[level][None]) ** 2).sum(2).argmin(1)
        np.testing.assert_array_equal(code, codes[:, level])
        residual = residual - books[level][code]
    total = sum(books[level][codes[:, level]] for level in range(3))
    np.testing.assert_allclose(
        quantizer.decode(torch.from_numpy(codes).long()).numpy(), total, atol=1e-6
    )
    np.testing.assert_allclose(scaled - total, residual, atol=1e-5)
    np.testing.assert_allclose(result.reconstruction_error, (residual**2).mean(), rtol=1e-4)


def test_balanced_residual_kmeans_fills_every_code_evenly():
    vectors = clusters(num_items=401)
    result = fit("rq-kmeans-balanced", vectors, SMALL, silent)
    assert all(np.bincount(level, minlength=8).max() <= 51 for level in result.codes.T)  # ⌈401/8⌉
    plain = fit("rq-kmeans", vectors, SMALL, silent)
    assert any(np.bincount(level).max() > 51 for level in plain.codes.T)

    # Items with equal IDs swap their last codes, and the codes stay even.
    assert collisions.collision_rate(result.codes) > 0
    separated = result.quantizer.separate(vectors, result.codes)
    assert collisions.collision_rate(separated) < 0.7 * collisions.collision_rate(result.codes)
    np.testing.assert_array_equal(np.bincount(separated[:, 2]), np.bincount(result.codes[:, 2]))
    np.testing.assert_array_equal(separated[:, :2], result.codes[:, :2])

    # The error is that of the codewords an item has; a new item gets the nearest ones.
    rows = result.quantizer.rows(vectors, slice(None))
    decoded = result.quantizer.decode(torch.from_numpy(result.codes).long())
    np.testing.assert_allclose(
        result.reconstruction_error, float((decoded - rows).square().mean()), rtol=1e-4
    )
    books = result.quantizer.codebooks
    assert torch.equal(result.quantizer.encode(rows), kmeans.nearest_residual(rows, books))


def test_pq_is_a_kmeans_per_segment():
    vectors = clusters(width=9)
    result = fit("pq", vectors, SMALL, silent)
    scaled = (vectors - vectors.mean(0)) / (vectors - vectors.mean(0)).std()
    decoded = []
    for level, segment in enumerate(np.split(scaled, 3, axis=1)):
        book = result.quantizer.codebooks[level].numpy()
        code = ((segment[:, None] - book[None]) ** 2).sum(2).argmin(1)
        np.testing.assert_array_equal(code, result.codes[:, level])
        decoded.append(book[code])
    error = ((scaled - np.concatenate(decoded, axis=1)) ** 2).mean()
    np.testing.assert_allclose(result.reconstruction_error, error, rtol=1e-4)


def test_large_data_is_sampled_and_encoded_in_chunks(monkeypatch):
    vectors = clusters(num_items=2000)
    whole = fit("rq-kmeans", vectors, SMALL, silent)
    for module in (quantizers, kmeans):
        monkeypatch.setattr(module, "CHUNK", 300)
    chunked = fit("rq-kmeans", vectors.astype(np.float16), SMALL, silent)
    assert (
        whole.codes == chunked.codes
    ).mean() > 0.8  # float16 moves a row over a border now and then
    monkeypatch.setattr(quantizers, "SAMPLE_PER_CODE", 50)
    assert len(chunked.quantizer.sample(vectors, torch.Generator())) == 400
    sampled = fit("rq-kmeans", vectors, SMALL, silent)
    assert sampled.reconstruction_error < 2 * whole.reconstruction_error


def test_straight_through_passes_the_gradient_on_unchanged():
    latent, words = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = quantizers.straight_through(latent, words)
    torch.testing.assert_close(out, words)
    weight = torch.randn(5, 4)
    (out * weight).sum().backward()
    torch.testing.assert_close(latent.grad, weight)
    assert words.grad is None


def test_each_loss_term_reaches_its_own_parameters():
    torch.manual_seed(0)
    model = RQVAE(8, SMALL)
    torch.nn.init.normal_(model.codebooks)
    rows = torch.randn(20, 8)
    found = model.losses(rows)
    codes, residuals = found.codes, found.residuals
    words = torch.stack([model.codebooks[level][codes[:, level]] for level in range(3)])
    torch.testing.assert_close(residuals[0], model.encoder(rows))
    torch.testing.assert_close(residuals[2], model.encoder(rows) - words[0] - words[1])

    error = ((residuals - words) ** 2).mean()
    torch.testing.assert_close(found.commitment, error)
    torch.testing.assert_close(
        found.reconstruction, ((model.decoder(words.sum(0)) - rows) ** 2).mean()
    )
    torch.testing.assert_close(found.loss, found.reconstruction + 1.25 * error)
    found.loss.backward()

    chosen = torch.nn.functional.one_hot(codes.T, 8).float()
    pull = (
        2 / residuals.numel() * chosen.transpose(1, 2) @ (words - residuals)
    )  # the codebook term alone moves codewords
    torch.testing.assert_close(model.codebooks.grad, pull)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in [*model.encoder.parameters(), *model.decoder.parameters()]
    )


def test_moving_average_is_the_mean_of_what_a_code_got():
    torch.manual_seed(0)
    model = RQVAE(8, replace(SMALL, ema=0.5))
    assert not model.codebooks.requires_grad
    torch.nn.init.normal_(model.codebooks)
    model.ema_sum.copy_(model.codebooks)
    before = model.codebooks.clone()
    codes, residuals = torch.randint(4, (20, 3)), torch.randn(3, 20, 4)  # codes 4 to 7 get nothing
    model._move_averages(codes, residuals)
    got = residuals[1][codes[:, 1] == 2]
    torch.testing.assert_close(model.codebooks[1, 2], (before[1, 2] + got.sum(0)) / (1 + len(got)))
    torch.testing.assert_close(model.codebooks[:, 4:], before[:, 4:])


def test_dead_codes_are_restarted_and_only_those():
    torch.manual_seed(0)
    model = RQVAE(8, SMALL)
    torch.nn.init.normal_(model.codebooks)
    optimizer = torch.optim.Adam(model.parameters())
    model.losses(torch.randn(20, 8)).loss.backward()
    optimizer.step()

    before = model.codebooks.detach().clone()
    dead = torch.zeros(3, 8, dtype=torch.bool)
    dead[1, [2, 5]] = True
    residuals = torch.randn(3, 20, 4)
    assert model.restart_dead(dead, residuals, optimizer, torch.Generator().manual_seed(0)) == 2
    torch.testing.assert_close(model.codebooks[~dead], before[~dead])
    for word in model.codebooks[dead]:
        assert (residuals[1] == word).all(1).any()

    state = optimizer.state[model.codebooks]
    assert (
        (state["exp_avg"][dead] == 0).all()
        and (state["exp_avg_sq"][dead] == 0).all()
        and (state["exp_avg"] != 0).any()
    )


def test_a_dead_codebook_comes_back_in_training(monkeypatch):
    """Started with every codeword but one out of reach, training uses most of the codes again."""

    def far_away(rows, codebooks, generator, log):
        codebooks[:] = 1e3
        codebooks[:, 0] = 0

    monkeypatch.setattr(quantizers, "residual_kmeans", far_away)
    result = fit("rq-vae", clusters(), SMALL, silent)
    assert all(collisions.use_and_perplexity(level, 8)[0] > 0.5 for level in result.codes.T)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9}, {"sinkhorn": 0.003}], ids=["gradient", "ema", "sinkhorn"]
)
def test_rq_vae_learns_and_uses_its_codes(changes):
    vectors, steps = clusters(), []
    result = fit(
        "rq-vae",
        vectors,
        replace(SMALL, **changes),
        lambda step, values: steps.append((step, values)),
    )
    assert result.reconstruction_error < 0.5  # 1 is the best constant
    assert all(collisions.use_and_perplexity(level, 8)[0] > 0.5 for level in result.codes.T)
    assert collisions.collapse_warnings(result.codes, [8] * 3) == []
    assert [step for step, _ in steps] == list(range(40)) and set(steps[0][1]) <= set(TAGS)
    assert (
        steps[-1][1]["quantizer/loss"] < steps[0][1]["quantizer/loss"]
        and steps[-1][1]["quantizer/restarted"] == 0
    )

    with torch.no_grad():
        rows = result.quantizer.rows(vectors, slice(None))
        codes = result.quantizer.encode(rows)
        error = (result.quantizer.decode(codes) - rows).square().mean()
    np.testing.assert_array_equal(codes.numpy(), result.codes)
    np.testing.assert_allclose(result.reconstruction_error, float(error), rtol=1e-4)


@pytest.mark.parametrize("name", quantizers.QUANTIZERS)
def test_the_seed_decides(name):
    vectors, options = clusters(), replace(SMALL, epochs=3, levels=2)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = fit(name, vectors, options, silent).codes
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(first, fit(name, vectors, options, silent).codes)
    assert (first != fit(name, vectors, replace(options, seed=1), silent).codes).any()
    assert (first.max(0) < 8).all()


def test_an_unfinished_training_gives_a_warning():
    assert (
        "raise --epochs" in fit("rq-vae", clusters(), replace(SMALL, epochs=2), silent).warnings[0]
    )
    assert quantizers._convergence_warnings([1.0] * 40) == []
    assert quantizers._convergence_warnings([0.5]) != []


def test_sinkhorn_balances():
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    distances[:, 0] -= 2  # nearest of all rows
    assert len(set(distances.argmin(1).tolist())) == 1
    counts = Counter(quantizers.sinkhorn_assignment(distances, 0.01).tolist())
    assert set(counts) == set(range(8)) and max(counts.values()) <= 12
    shifted = (
        distances + torch.arange(64)[:, None]
    )  # what the distances leave out is the same within a row
    assert torch.equal(
        quantizers.sinkhorn_assignment(shifted, 0.01),
        quantizers.sinkhorn_assignment(distances, 0.01),
    )
    apart = torch.full((4, 4), 9.0).fill_diagonal_(0.0)
    assert quantizers.sinkhorn_assignment(apart, 0.003).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vq",
            {},
            "unknown --quantizer 'vq' \\(known: rq-kmeans-balanced, rq-kmeans, rq-vae, pq\\)",
        ),
        ("pq", {"levels": 3}, "an embedding of 8 entries cannot be cut into 3 equal segments"),
        ("rq-vae", {"levels": 27}, "--levels 27: must be 1 to 26"),
        (
            "rq-vae",
            {"codes": 401},
            "--codes 401: the codebook is larger than the data, which has 400 items",
        ),
        ("rq-vae", {"codes": 1}, "--codes 1: must be at least 2"),
        ("rq-vae", {"epochs": 0}, "--epochs 0: must be at least 1"),
        ("rq-vae", {"learning_rate": 0.0}, "--learning_rate 0.0"),
        ("rq-vae", {"ema": 1.0}, "--ema 1.0: must be 0 \\(off\\) or a decay"),
        ("rq-vae", {"sinkhorn": -1.0}, "--sinkhorn -1.0"),
        ("rq-vae", {"cf_temperature": 0.0}, "--cf_temperature 0.0: must be above 0"),
        ("rq-vae", {"diversity_weight": -1.0}, "--diversity_weight -1.0: must not be negative"),
        ("rq-vae", {"diversity_weight": 1e-4, "ema": 0.9}, "leave one of them out"),
        ("rq-vae", {"diversity_weight": 1e-4}, "8 codes do not make 10 groups of at least two"),
    ],
)
def test_bad_options(name, changes, message):
    with pytest.raises(UsageError, match=message):
        fit(name, clusters(), replace(SMALL, **changes), silent)


# ---- collisions ----


def distinct(codes):
    return len(np.unique(codes, axis=0))


def cases():
    random = np.random.default_rng(0)
    yield "all equal", np.zeros((64, 3), int), [4, 4, 4]  # as many items as IDs
    yield "few", random.integers(0, 3, (50, 3)), [5, 5, 5]
    yield (
        "one full prefix",
        np.concatenate([np.tile([[1, 1, 0]], (9, 1)), [[1, 1, 3], [0, 0, 0]]]),
        [3, 3, 4],
    )
    yield "uneven sizes", random.integers(0, 2, (200, 3)), [2, 7, 30]
    yield "unique", np.array(list(product(range(3), repeat=3))), [3, 3, 3]
    yield "one level", np.array([[0], [0], [2], [2], [1]]), [6]


@pytest.mark.parametrize(
    ("codes", "sizes"), [case[1:] for case in cases()], ids=[case[0] for case in cases()]
)
def test_reassign_is_unique_minimal_and_seeded(codes, sizes):
    before = codes.copy()
    unique = resolve_collisions(codes, sizes, "reassign", 0)
    np.testing.assert_array_equal(codes, before)  # the input stays
    assert unique.dtype == np.int32 and distinct(unique) == len(codes)
    assert (unique >= 0).all() and (unique < sizes).all()
    changed = (unique != codes).any(1)
    assert changed.sum() == len(codes) - distinct(codes)  # one item of each group keeps its ID
    np.testing.assert_array_equal(unique, resolve_collisions(codes, sizes, "reassign", 0))
    # Only the last code changes, except for as many items as the prefix has too many.
    last = sizes[-1]
    too_many = sum(max(n - last, 0) for n in Counter(map(tuple, codes[:, :-1].tolist())).values())
    assert (unique[:, :-1] != codes[:, :-1]).any(1).sum() == too_many


def test_reassign_is_random():
    codes = np.zeros((20, 2), int)
    results = [resolve_collisions(codes, [3, 50], "reassign", seed) for seed in range(30)]
    assert len({tuple(map(tuple, r.tolist())) for r in results}) == 30
    assert all((r[:, 0] == 0).all() for r in results)
    kept = Counter(int(np.flatnonzero(r[:, 1] == 0)[0]) for r in results)
    assert len(kept) > 5  # which item of a group keeps its ID is drawn too


def test_reassign_prefers_to_move_what_collides():
    """A prefix has five items and four last codes: one of the two duplicates leaves."""
    codes = np.array([[0, 0], [0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])
    for seed in range(10):
        unique = resolve_collisions(codes, [2, 4], "reassign", seed)
        np.testing.assert_array_equal(unique[2:], codes[2:])
        assert distinct(unique) == 6 and sorted(unique[:2, 0]) == [0, 1]


def test_extra_numbers_the_items_of_a_group():
    codes = np.array([[1, 1], [0, 2], [1, 1], [1, 1], [0, 2], [0, 0]])
    unique = resolve_collisions(codes, [2, 3], "extra", 0)
    np.testing.assert_array_equal(unique[:, :2], codes)
    assert unique[:, 2].tolist() == [0, 0, 1, 2, 1, 0]
    same = resolve_collisions(np.zeros((300, 2), int), [2, 2], "extra", 0)
    assert same[:, 2].tolist() == list(range(300))
    np.testing.assert_array_equal(resolve_collisions(codes, [2, 3], "keep", 0), codes)


def test_collisions_that_cannot_be_resolved():
    with pytest.raises(UsageError, match="10 items, but only 9 different IDs"):
        resolve_collisions(np.zeros((10, 2), int), [3, 3], "reassign", 0)
    with pytest.raises(UsageError, match="no letter is left"):
        resolve_collisions(np.zeros((2, 26), int), [2] * 26, "extra", 0)
    with pytest.raises(
        UsageError, match=r"unknown --collisions 'drop' \(known: reassign, extra, keep\)"
    ):
        resolve_collisions(np.zeros((2, 2), int), [2, 2], "drop", 0)


# ---- measures ----


def test_measures_against_brute_force():
    random = np.random.default_rng(3)
    codes, sizes = random.integers(0, 3, (40, 3)), [3, 4, 3]
    counts = random.integers(0, 5, 40)
    paths = list(map(tuple, codes.tolist()))
    assert collisions.collision_rate(codes) == pytest.approx(1 - len(set(paths)) / 40)
    share, perplexity = collisions.use_and_perplexity(codes[:, 1], 4)
    p = np.array(list(Counter(codes[:, 1].tolist()).values())) / 40
    assert share == 3 / 4 and perplexity == pytest.approx(np.prod(p**-p))

    def purity(prefix):
        under = [i for i in range(40) if paths[i][: len(prefix)] == prefix]
        q = counts[under] / max(counts[under].sum(), 1)
        return (
            1.0
            if len(under) == 1
            else 1 + sum(x * np.log(x) for x in q if x > 0) / np.log(len(under))
        )

    measures = collisions.trie_measures(codes, sizes, counts)
    for level in range(3):
        edges = sorted({path[: level + 1] for path in paths})
        size = Counter(path[: level + 1] for path in paths), Counter(path[:level] for path in paths)
        assert measures.filtering_ratio[level] == pytest.approx(
            np.mean([1 - size[0][e] / size[1][e[:-1]] for e in edges])
        )
        gains = {edge: purity(edge) - purity(edge[:-1]) for edge in edges}
        assert measures.purity_gain[level] == pytest.approx(np.mean(list(gains.values())))
        by_token = measures.purity_gain_by_token[level]
        assert len(by_token) == sizes[level]
        for code, found in enumerate(by_token):
            expected = [gain for edge, gain in gains.items() if edge[-1] == code]
            assert found == (pytest.approx(np.mean(expected), abs=1e-6) if expected else None)


def test_a_collapsed_codebook_gives_a_warning():
    codes = np.stack([np.zeros(1000, int), np.arange(1000) % 256, np.arange(1000) % 12], axis=1)
    warnings = collisions.collapse_warnings(codes, [256] * 3)
    assert (
        len(warnings) == 2
        and "level a has collapsed: 0.4% of 256 codes used, perplexity 1.0" in warnings[0]
    )
    assert "level c" in warnings[1]
    skewed = np.where(np.arange(1000) < 970, 0, np.arange(1000) % 30)[
        :, None
    ]  # uses enough codes, but hardly
    assert "level a" in collisions.collapse_warnings(skewed, [256])[0]
