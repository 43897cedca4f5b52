"""LETTER's losses against their formulas in fp64, and the recommenders that give embeddings."""

import math

import numpy as np
import pytest
import torch

from igd_ds.baselines.counted import Popularity
from igd_ds.baselines.models import SASRec
from igd_ds.baselines.saved import CONFIG_FILE
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.semantic_ids import letter
from igd_ds.semantic_ids.quantizers import RQVAE, QuantizerOptions, fit

OPTIONS = QuantizerOptions(levels=2, codes=20, epochs=3, batch_size=64, hidden=(16,), latent=4)


def test_collaborative_loss_equals_its_formula():
    torch.manual_seed(0)
    z, h = torch.randn(6, 4).double().requires_grad_(), torch.randn(6, 4).double()
    found = letter.collaborative_loss(z, h, temperature=0.3)

    expected = 0.0
    for i in range(6):
        cosine = torch.cosine_similarity(z[i].detach()[None], h).tolist()
        shares = [math.exp(value / 0.3) for value in cosine]
        expected -= math.log(shares[i] / sum(shares)) / 6
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert z.grad.abs().sum() > 0


def test_diversity_loss_equals_its_formula():
    torch.manual_seed(0)
    books = torch.randn(2, 5, 3).double().requires_grad_()
    groups = torch.tensor([[0, 0, 1, 1, 1], [2, 0, 0, 0, 0]])  # code 0 of level 1 is alone
    codes = torch.tensor([[0, 0], [2, 3], [4, 1], [2, 4]])
    found = letter.diversity_loss(codes, books, groups)

    expected = 0.0
    for row in codes.tolist():
        for level, c in enumerate(row):
            others = [k for k in range(5) if k != c]
            share = {k: math.exp(float(books[level, c] @ books[level, k])) for k in others}
            positives = [k for k in others if groups[level, k] == groups[level, c]]
            terms = [-math.log(share[k] / sum(share.values())) for k in positives]
            expected += (sum(terms) / len(terms) if terms else 0.0) / codes.numel()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert torch.isfinite(books.grad).all() and books.grad.abs().sum() > 0


def test_groups_are_balanced_and_seeded():
    books = torch.randn(3, 37, 4)
    groups = letter.group_codes(books, torch.Generator().manual_seed(0))
    assert groups.shape == (3, 37)
    assert all(level.bincount(minlength=letter.GROUPS).max() <= 4 for level in groups)
    assert torch.equal(groups, letter.group_codes(books, torch.Generator().manual_seed(0)))


def test_the_losses_are_added_with_their_weights():
    torch.manual_seed(0)
    rows, collaborative = torch.randn(30, 8).double(), torch.randn(30, 4).double()
    options = QuantizerOptions(
        levels=2, codes=20, hidden=(16,), latent=4, cf_weight=0.7, diversity_weight=0.3
    )
    model = RQVAE(8, options).double()
    torch.nn.init.normal_(model.codebooks)
    model.groups = letter.group_codes(model.codebooks, torch.Generator().manual_seed(0))
    found = model.losses(rows, collaborative)
    words = model.sum_of_codewords(found.codes)
    plain = found.reconstruction + 1.25 * found.commitment
    added = 0.7 * letter.collaborative_loss(words, collaborative, options.cf_temperature)
    added += 0.3 * letter.diversity_loss(found.codes, model.codebooks, model.groups)
    torch.testing.assert_close(found.loss, plain + added, rtol=1e-12, atol=0)
    assert set(model.state_dict()) == set(RQVAE(8, OPTIONS).state_dict())  # nothing more is saved


def test_training_aligns_the_codes_with_the_embeddings():
    """Titles say nothing here: only the collaborative embeddings know the two halves apart."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(200, 8)).astype(np.float32)
    collaborative = torch.from_numpy(random.normal(size=(200, 4)).astype(np.float32) * 0.1)
    collaborative[:100] += 1.0

    def loss_after(cf_weight):
        options = QuantizerOptions(
            levels=2, codes=20, epochs=40, batch_size=100, hidden=(32,), latent=4,
            learning_rate=0.01, cf_weight=cf_weight,
        )  # fmt: skip
        result = fit("rq-vae", vectors, options, lambda step, values: None, collaborative)
        words = result.quantizer.sum_of_codewords(torch.from_numpy(result.codes).long())
        with torch.no_grad():
            return float(letter.collaborative_loss(words, collaborative, 0.1))

    assert loss_after(1.0) < 0.8 * loss_after(0.0)


def recommender(folder, model, name, dataset="abc"):
    model.save_pretrained(folder / "model")
    form = {"num_items": 9, "max_history": 5, "hidden_size": 4, "num_layers": 1}
    form |= {"num_heads": 1, "dropout": 0.0}
    description = {"recommender": name, "form": form, "dataset": dataset}
    write_json(folder / "model" / CONFIG_FILE, description)
    return folder


def test_embeddings_of_a_recommender_and_what_does_not_fit(tmp_path):
    model = SASRec(9, 5, 4, 1, 1, 0.0)
    run = recommender(tmp_path / "sasrec", model, "sasrec")
    table = letter.load_collaborative(run, "abc", latent=4)
    torch.testing.assert_close(table, model.items.weight.detach())

    with pytest.raises(UsageError, match="trained on another dataset"):
        letter.load_collaborative(run, "other", latent=4)
    with pytest.raises(UsageError, match="width 4 .* width 32; give --latent 4, or train"):
        letter.load_collaborative(run, "abc", latent=32)
    with pytest.raises(UsageError, match="config.json or model.safetensors beside it is missing"):
        letter.load_collaborative(tmp_path / "nowhere", "abc", latent=4)
    counted = recommender(tmp_path / "pop", Popularity(torch.ones(9) / 9), "popularity")
    with pytest.raises(UsageError, match="popularity has no item embeddings"):
        letter.load_collaborative(counted, "abc", latent=4)
