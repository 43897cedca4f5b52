"""Semantic IDs from item embeddings: residual k-means, RQ-VAE and product quantization.

Letters in shapes: N items, D width of an embedding, L levels, K codes per level, d width of a
codeword, B rows of a batch, n rows of a k-means sample. Codes are integers in [0, K). Code c of
level l is written as the token `<a_c>` for l = 0, `<b_c>` for l = 1, and so on.

RQ-VAE is by Lee et al. 2022 (arXiv:2203.01941), with the settings of LETTER and LC-Rec. TIGER
introduced its use for item IDs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from igd_ds import distributed
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.semantic_ids import balanced, letter
from igd_ds.semantic_ids.collisions import LEVEL_LETTERS, collision_rate, use_and_perplexity
from igd_ds.semantic_ids.kmeans import (
    CHUNK,
    kmeans,
    nearest,
    nearest_residual,
    squared_distances,
)

SAMPLE_PER_CODE = 256  # k-means learns from at most this many rows per code (the default of faiss)
SINKHORN_ITERATIONS = 50  # as in LC-Rec
RESTART_INTERVAL = 100
"""Optimizer steps, or an epoch if that is shorter, after which a code without any item counts as
dead (assumed)."""
RESTART_UNTIL = 0.9  # share of the epochs with restarts; the rest trains undisturbed (assumed)

Log = Callable[[int, dict[str, float]], None]
"""Takes a step and its scalars, named as in `runlog.TAGS`."""


@dataclass(frozen=True)
class QuantizerOptions:
    """How codes are learned. The fields from `epochs` on concern RQ-VAE alone."""

    levels: int = 4
    """L (MTC: 4)."""
    codes: int = 256
    """K (MTC: 256)."""
    seed: int = 0
    epochs: int = 500
    """Passes over the items. The fit warns if the error was still falling at the end."""
    learning_rate: float = 1e-3
    """Of Adam, constant (LETTER, LC-Rec)."""
    batch_size: int = 1024
    hidden: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    """Widths of the encoder's hidden layers; the decoder has them in reverse order (LC-Rec)."""
    latent: int = 32
    """d: width of the latent space and of the codewords."""
    commitment: float = 0.25
    """Weight of the commitment term."""
    sinkhorn: float = 0.0
    """0: training gives each residual its nearest code. Above 0: training assigns codes evenly
    within each batch, by Sinkhorn's algorithm with this regularisation (LETTER, LC-Rec: 0.003). The
    final IDs are the nearest codes in both cases."""
    ema: float = 0.0
    """0: the codebook is trained by its gradient. Above 0: it is an exponential moving average with
    this decay (usual: 0.99)."""
    cf_weight: float = 0.1
    """α: weight of LETTER's collaborative loss, where collaborative embeddings are given."""
    cf_temperature: float = 0.1
    """τ of the collaborative loss (assumed)."""
    diversity_weight: float = 0.0
    """β: weight of LETTER's diversity loss (LETTER: 1e-4); 0 is off."""


class Quantizer(nn.Module, ABC):
    """Base class of the quantizers: scaled rows and one codebook per level.

    Rows are centred and divided by one number, so that settings mean the same for the embeddings of
    any encoder. The entries of scaled rows have variance 1 on average.

    Attributes:
        mean: (D,), subtracted from each row.
        scale: (), each row is divided by it.
        codebooks: (L, K, d) float32.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, codeword_width: int, options: QuantizerOptions):
        super().__init__()
        self.options = options
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.codebooks = nn.Parameter(
            torch.zeros(options.levels, options.codes, codeword_width), requires_grad=False
        )

    @abstractmethod
    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Learn from `vectors` (N, D) and return warnings."""

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes int64 (B, L) of scaled rows (B, D): the nearest code of each level."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the scaled rows (B, D) that codes (B, L) stand for."""

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """Return the codes int32 (N, L) of all items."""
        chunks = (slice(start, start + CHUNK) for start in range(0, len(vectors), CHUNK))
        codes = [self.encode(self.rows(vectors, chunk)).cpu() for chunk in chunks]
        return torch.cat(codes).numpy().astype(np.int32)

    def separate(self, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return `codes` (N, L) with fewer equal IDs, if the quantizer can choose better codes than
        chance can; by default `codes` itself."""
        return codes

    def rows(self, vectors: np.ndarray, index: slice | np.ndarray) -> torch.Tensor:
        """Return scaled float32 rows of `vectors`, on this quantizer's device."""
        rows = torch.from_numpy(np.array(vectors[index], np.float32)).to(self.mean.device)
        return (rows - self.mean) / self.scale

    def measure_scale(self, vectors: np.ndarray) -> None:
        """Set `mean` and `scale` from all rows, in fp64 and in chunks."""
        total = np.zeros(vectors.shape[1])
        for chunk in _chunks(vectors):
            total += chunk.sum(0)
        mean = total / len(vectors)

        squares = 0.0
        for chunk in _chunks(vectors):
            squares += float(np.square(chunk - mean).sum())

        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_((squares / vectors.size) ** 0.5)

    def sample(self, vectors: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        """Return scaled rows (n, D) for k-means: all, or a seeded sample.

        A sample has SAMPLE_PER_CODE rows per code.
        """
        limit = SAMPLE_PER_CODE * self.options.codes
        if len(vectors) <= limit:
            return self.rows(vectors, slice(None))
        chosen = torch.randperm(len(vectors), generator=generator)[:limit]
        return self.rows(vectors, chosen.sort().values.numpy())

    def sum_of_codewords(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the sum (B, d) of the codewords that codes (B, L) name, one per level."""
        total = self.codebooks[0][codes[:, 0]]
        for level in range(1, self.options.levels):
            total = total + self.codebooks[level][codes[:, level]]
        return total


class ResidualKMeans(Quantizer):
    """RQ-k-means: each level is a k-means over the residuals of the levels before it.

    A row is the sum of its codewords, so d = D.
    """

    def __init__(self, width: int, options: QuantizerOptions):
        super().__init__(width, width, options)

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Learn one codebook after the other on a sample of the rows."""
        self.measure_scale(vectors)
        generator = torch.Generator().manual_seed(self.options.seed)
        residual_kmeans(self.sample(vectors, generator), self.codebooks.data, generator, log)
        return []

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.encode`."""
        return nearest_residual(rows, self.codebooks)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.decode`."""
        return self.sum_of_codewords(codes)


class BalancedResidualKMeans(ResidualKMeans):
    """RQ-k-means whose codes have at most ⌈N/K⌉ items at each level.

    The codes of a dataset's items are assigned together (see `balanced`): an item whose nearest
    codeword is full gets another one. `encode` takes the nearest codes, as for items that are new.
    All rows and their N·K distances are in memory at once.
    """

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Learn one codebook after the other on a sample of the rows."""
        self.measure_scale(vectors)
        generator = torch.Generator().manual_seed(self.options.seed)
        residual_kmeans(
            self.sample(vectors, generator), self.codebooks.data, generator, log, is_balanced=True
        )
        return []

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """Return the codes int32 (N, L) of all items; ⌈N/K⌉ items at most have the same."""
        rows, codes = self.rows(vectors, slice(None)), []
        for book in self.codebooks:
            codes.append(balanced.balanced_codes(rows, book))
            rows = rows - book[codes[-1]]
        return torch.stack(codes, 1).cpu().numpy().astype(np.int32)

    def separate(self, vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Let items with equal IDs swap their last code with other items, at the least distance."""
        rows, earlier = self.rows(vectors, slice(None)), torch.from_numpy(codes[:, :-1]).long()
        for book, code in zip(self.codebooks, earlier.to(rows.device).T, strict=False):
            rows = rows - book[code]
        return balanced.swap_equal_ids(codes, balanced.costs(rows, self.codebooks[-1]))


class ProductQuantizer(Quantizer):
    """PQ: a row is cut into L equal segments, and each has a k-means of its own (MTC 5.2.3).

    A codeword is a segment, so d = D / L.
    """

    def __init__(self, width: int, options: QuantizerOptions):
        super().__init__(width, width // options.levels, options)

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Learn the segments' codebooks on a sample of the rows."""
        levels, num_codes = self.options.levels, self.options.codes
        self.measure_scale(vectors)
        generator = torch.Generator().manual_seed(self.options.seed)
        segments = self.sample(vectors, generator).chunk(levels, dim=1)

        error = 0.0
        for level, segment in enumerate(segments):
            self.codebooks.data[level] = kmeans(segment, num_codes, generator)
            codes = nearest(segment, self.codebooks[level])
            error += float((segment - self.codebooks[level][codes]).square().mean()) / levels
            log(level, _level_scalars(level, codes.cpu().numpy(), num_codes))

        log(levels - 1, {"quantizer/reconstruction": error})
        return []

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.encode`."""
        segments = rows.chunk(self.options.levels, dim=1)
        codes = [nearest(s, book) for s, book in zip(segments, self.codebooks, strict=True)]
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.decode`."""
        segments = [book[codes[:, level]] for level, book in enumerate(self.codebooks)]
        return torch.cat(segments, dim=1)


@dataclass(frozen=True)
class Quantization:
    """Latents (B, d) written with one codeword per level."""

    codes: torch.Tensor
    """int64 (B, L)."""
    residuals: torch.Tensor
    """(L, B, d), the input of each level, with gradient to the latents alone."""
    words: torch.Tensor
    """(L, B, d), the chosen codewords, with gradient to the codebooks alone."""


@dataclass(frozen=True)
class RQVAELosses:
    """The loss of RQ-VAE and its terms, each (), and the codes and residuals behind them."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    commitment: torch.Tensor
    """Without its weight."""
    codes: torch.Tensor
    """int64 (B, L)."""
    residuals: torch.Tensor
    """(L, B, d), detached."""


class RQVAE(Quantizer):
    """RQ-VAE: an autoencoder whose latent is a sum of codewords (Lee et al. 2022, Eq. 1-4).

    The latent (d,) is the sum of one codeword per level. The loss is |x − x'|² + mean over levels
    of |sg(r) − e|² + commitment · |r − sg(e)|², all as means over entries. Here r is the residual
    of the latent after the levels before, e is the chosen codeword, and sg stops the gradient. The
    decoder sees the sum of the codewords, and its gradient goes to the latent unchanged
    (straight-through).

    LETTER's losses are added where collaborative embeddings or a diversity weight are given (see
    `letter`).
    """

    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    collaborative: torch.Tensor | None
    """(N, d), collaborative embeddings of the items that it is fitted to."""
    groups: torch.Tensor
    """int64 (L, K), the group of each code in LETTER's diversity loss."""

    def __init__(self, width: int, options: QuantizerOptions):
        super().__init__(width, options.latent, options)
        widths = [width, *options.hidden, options.latent]
        self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
        self.register_buffer("ema_count", torch.ones(options.levels, options.codes))
        self.register_buffer("ema_sum", torch.zeros_like(self.codebooks))
        self.codebooks.requires_grad_(not options.ema)

        # Only the training uses these; they are not saved.
        groups = torch.zeros(options.levels, options.codes, dtype=torch.int64)
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("collaborative", None, persistent=False)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.encode`."""
        return nearest_residual(self.encoder(rows), self.codebooks)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.decode`."""
        rows: torch.Tensor = self.decoder(self.sum_of_codewords(codes))
        return rows

    def quantize(self, latent: torch.Tensor) -> Quantization:
        """Choose one codeword per level for latents (B, d)."""
        codes, residuals, words = [], [], []
        residual = latent
        for book in self.codebooks:
            with torch.no_grad():
                if self.options.sinkhorn:
                    distances = squared_distances(residual, book)
                    code = sinkhorn_assignment(distances, self.options.sinkhorn)
                else:
                    code = nearest(residual, book)
            word = functional.embedding(code, book)

            codes.append(code)
            residuals.append(residual)
            words.append(word)
            residual = residual - word.detach()
        return Quantization(torch.stack(codes, 1), torch.stack(residuals), torch.stack(words))

    def losses(self, rows: torch.Tensor, collaborative: torch.Tensor | None = None) -> RQVAELosses:
        """Return the loss of scaled rows (B, D) and its terms.

        Args:
            rows: (B, D).
            collaborative: (B, d), collaborative embeddings of the same items, for LETTER's L_CF.
        """
        options = self.options
        latent = self.encoder(rows)
        chosen = self.quantize(latent)
        quantized = straight_through(latent, chosen.words.sum(0))
        reconstructed = self.decoder(quantized)

        reconstruction = functional.mse_loss(reconstructed, rows)
        commitment = functional.mse_loss(chosen.residuals, chosen.words.detach())
        loss = reconstruction + options.commitment * commitment
        if not options.ema:
            loss = loss + functional.mse_loss(chosen.words, chosen.residuals.detach())

        if collaborative is not None:
            aligned = letter.collaborative_loss(quantized, collaborative, options.cf_temperature)
            loss = loss + options.cf_weight * aligned
        if options.diversity_weight:
            spread = letter.diversity_loss(chosen.codes, self.codebooks, self.groups)
            loss = loss + options.diversity_weight * spread
        return RQVAELosses(
            loss, reconstruction, commitment, chosen.codes, chosen.residuals.detach()
        )

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Train encoder, decoder and codebooks.

        Each level's codebook starts from a k-means over the untrained encoder's latents.
        """
        options = self.options
        self.measure_scale(vectors)
        generator = torch.Generator().manual_seed(options.seed)

        with torch.no_grad():
            sample = self.sample(vectors, generator)
            latents = torch.cat([self.encoder(chunk) for chunk in sample.split(CHUNK)])
            del sample
            residual_kmeans(latents, self.codebooks.data, generator, lambda level, values: None)
        self.ema_sum.copy_(self.codebooks)

        optimizer = torch.optim.Adam(
            [p for p in self.parameters() if p.requires_grad], lr=options.learning_rate
        )
        errors = []
        for epoch in tqdm(range(options.epochs), desc="RQ-VAE", unit="epoch", mininterval=1.0):
            restart = epoch < RESTART_UNTIL * options.epochs
            values, codes = self._epoch(vectors, optimizer, generator, restart)
            errors.append(values["quantizer/reconstruction"])
            for level in range(options.levels):
                values |= _level_scalars(level, codes[:, level], options.codes)
            log(epoch, values | {"quantizer/collision_rate": collision_rate(codes)})
        return _convergence_warnings(errors)

    def _epoch(
        self,
        vectors: np.ndarray,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        restart: bool,
    ) -> tuple[dict[str, float], np.ndarray]:
        """Make one pass over all rows, in random order.

        Returns:
            The epoch's scalars by tag, and the codes int32 (N, L) as they were assigned during the
            pass.
        """
        device, batch_size = self.mean.device, self.options.batch_size
        order = torch.randperm(len(vectors), generator=generator).numpy()
        starts = range(0, len(order), batch_size)
        interval = min(RESTART_INTERVAL, len(starts))

        codes_of_item = np.empty((len(vectors), self.options.levels), np.int32)
        used = torch.zeros(self.codebooks.shape[:2], device=device)
        names = ("loss", "reconstruction", "commitment")
        sums = {name: torch.zeros((), device=device) for name in names}  # no host read in a step
        restarted = 0
        if self.options.diversity_weight:
            self.groups = letter.group_codes(self.codebooks, generator)

        for step, start in enumerate(starts, 1):
            index = order[start : start + batch_size]
            collaborative = self.collaborative
            if collaborative is not None:
                collaborative = collaborative[torch.from_numpy(index).to(device)]
            losses = self.losses(self.rows(vectors, index), collaborative)
            optimizer.zero_grad(set_to_none=True)
            losses.loss.backward()
            optimizer.step()
            if self.options.ema:
                self._move_averages(losses.codes, losses.residuals)

            used += _counts(losses.codes, self.options.codes)
            if restart and step % interval == 0:
                restarted += self.restart_dead(used == 0, losses.residuals, optimizer, generator)
                used.zero_()

            codes_of_item[index] = losses.codes.cpu().numpy()
            for name in names:
                sums[name] += getattr(losses, name).detach() * len(index)

        values = {f"quantizer/{name}": float(value) / len(order) for name, value in sums.items()}
        return values | {"quantizer/restarted": float(restarted)}, codes_of_item

    def _move_averages(self, codes: torch.Tensor, residuals: torch.Tensor) -> None:
        """Move each codeword towards the mean of the residuals that were assigned to it.

        The method is by van den Oord et al. 2017, appendix A.1.

        Args:
            codes: int64 (B, L).
            residuals: (L, B, d).
        """
        decay = self.options.ema
        chosen = functional.one_hot(codes.T, self.options.codes).to(residuals.dtype)  # (L, B, K)
        self.ema_count.lerp_(chosen.sum(1), 1 - decay)
        self.ema_sum.lerp_(chosen.transpose(1, 2) @ residuals, 1 - decay)

        # While a code gets no residual, count and sum shrink alike and the codeword stays. The
        # lower bound prevents 0 / 0 for a code that has been dead for long.
        self.codebooks.data = self.ema_sum / self.ema_count.clamp_min(1e-12)[..., None]

    def restart_dead(
        self,
        dead: torch.Tensor,
        residuals: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> int:
        """Move dead codes to random residuals of their level, and return how many there were.

        The moments that Adam gathered for them, and their moving averages, are reset.

        Args:
            dead: bool (L, K).
            residuals: (L, B, d).
            optimizer: the optimizer that trains the codebooks.
            generator: source of the random choices.
        """
        state = optimizer.state.get(self.codebooks, {})
        for level, dead_codes in enumerate(dead.cpu()):
            codes = dead_codes.nonzero()[:, 0]
            picked = torch.randint(residuals.shape[1], (len(codes),), generator=generator)
            at = codes.to(dead.device)
            words = residuals[level][picked.to(dead.device)]

            self.codebooks.data[level, at] = words
            self.ema_sum[level, at] = words
            self.ema_count[level, at] = 1.0
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][level, at] = 0.0
        return int(dead.sum())


QUANTIZERS: dict[str, Callable[[int, QuantizerOptions], Quantizer]] = {
    "rq-kmeans-balanced": BalancedResidualKMeans,
    "rq-kmeans": ResidualKMeans,
    "rq-vae": RQVAE,
    "pq": ProductQuantizer,
}
"""Name → quantizer, made from (D, options); the first is the default. A new quantizer is a class
and a line here."""


@dataclass(frozen=True)
class Quantized:
    """A fitted quantizer and the codes it gives to all items."""

    codes: np.ndarray
    """int32 (N, L), before collisions are resolved."""
    reconstruction_error: float
    """Sum of squared errors over sum of squared distances to the mean. 0 is exact; 1 is no better
    than the mean."""
    quantizer: Quantizer
    warnings: list[str]


def fit(
    name: str,
    vectors: np.ndarray,
    options: QuantizerOptions,
    log: Log,
    collaborative: torch.Tensor | None = None,
) -> Quantized:
    """Fit a quantizer and encode all items. The same seed on the same machine gives the same codes.

    Args:
        name: a key of QUANTIZERS.
        vectors: (N, D) float, finite and not all equal; may be a memory map.
        options: how codes are learned.
        log: is called with a step and its scalars. A step is an epoch for RQ-VAE, a level for the
            others.
        collaborative: (N, latent) float32, collaborative embeddings of the items, which RQ-VAE's
            codes are then aligned with (LETTER's L_CF).

    Raises:
        UsageError: see `check_options`.

    Example:
        >>> options = QuantizerOptions(levels=3, codes=64)
        >>> fit("rq-kmeans", vectors, options, lambda step, values: None).codes.shape
        (N, 3)
    """
    check_options(name, options, *vectors.shape)
    device = distributed.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        quantizer = QUANTIZERS[name](vectors.shape[1], options).to(device)
        if isinstance(quantizer, RQVAE) and collaborative is not None:
            quantizer.collaborative = collaborative.to(device)
        warnings = quantizer.fit(vectors, log)

    error = 0.0
    with torch.no_grad():
        codes = quantizer.assign(vectors)
        for start in range(0, len(vectors), CHUNK):
            part = slice(start, start + CHUNK)
            rows = quantizer.rows(vectors, part)
            decoded = quantizer.decode(torch.from_numpy(codes[part]).long().to(device))
            error += float((decoded - rows).square().sum(dtype=torch.float64))
    return Quantized(codes, error / vectors.size, quantizer, warnings)


def check_options(name: str, options: QuantizerOptions, num_items: int, width: int) -> None:
    """Check that a quantizer with these options can work for N items of width D.

    Raises:
        UsageError: it cannot; the message names the flag and what to do.
    """
    if name not in QUANTIZERS:
        hint, known = did_you_mean(name, QUANTIZERS), ", ".join(QUANTIZERS)
        raise UsageError(f"unknown --quantizer '{name}'{hint} (known: {known})")

    # Sizes of the codebooks.
    if not 1 <= options.levels <= len(LEVEL_LETTERS):
        raise UsageError(
            f"--levels {options.levels}: must be 1 to {len(LEVEL_LETTERS)}: each level has a letter"
        )
    if options.codes < 2:
        raise UsageError(f"--codes {options.codes}: must be at least 2")
    if num_items < options.codes:
        raise UsageError(
            f"--codes {options.codes}: the codebook is larger than the data, which has {num_items} "
            f"items; give at most {num_items}"
        )
    if name == "pq" and width % options.levels:
        raise UsageError(
            f"--quantizer pq: an embedding of {width} entries cannot be cut into {options.levels} "
            "equal segments; give --levels that divides the number of entries"
        )

    # Training of RQ-VAE.
    for flag, value in [
        ("epochs", options.epochs),
        ("batch_size", options.batch_size),
        ("latent", options.latent),
    ]:
        if value < 1:
            raise UsageError(f"--{flag} {value}: must be at least 1")
    if options.learning_rate <= 0:
        raise UsageError(f"--learning_rate {options.learning_rate}: must be above 0")
    if not 0 <= options.ema < 1:
        raise UsageError(f"--ema {options.ema}: must be 0 (off) or a decay below 1, such as 0.99")
    if options.sinkhorn < 0 or options.commitment < 0:
        raise UsageError(
            f"--sinkhorn {options.sinkhorn}, --commitment {options.commitment}: must not be "
            "negative"
        )

    # LETTER's losses.
    if options.cf_weight < 0 or options.cf_temperature <= 0 or options.diversity_weight < 0:
        raise UsageError(
            f"--cf_weight {options.cf_weight}, --diversity_weight {options.diversity_weight}: must "
            f"not be negative; --cf_temperature {options.cf_temperature}: must be above 0"
        )
    if options.diversity_weight and options.ema:
        raise UsageError(
            f"--diversity_weight {options.diversity_weight}: a codebook of moving averages (--ema) "
            "has no gradient that the diversity loss could change; leave one of them out"
        )
    if options.diversity_weight and options.codes < 2 * letter.GROUPS:
        raise UsageError(
            f"--diversity_weight {options.diversity_weight}: {options.codes} codes do not make "
            f"{letter.GROUPS} groups of at least two; give at least --codes {2 * letter.GROUPS}"
        )


def residual_kmeans(
    rows: torch.Tensor,
    codebooks: torch.Tensor,
    generator: torch.Generator,
    log: Log,
    is_balanced: bool = False,
) -> None:
    """Fill `codebooks` in place: each level is a k-means over the residuals of the levels before.

    Args:
        rows: (n, D).
        codebooks: (L, K, D), filled in place.
        generator: source of the random starts.
        log: is called with each level's number and scalars.
        is_balanced: each code gets at most ⌈n/K⌉ rows, see `balanced.balanced_kmeans`.
    """
    for level in range(len(codebooks)):
        codebooks[level] = kmeans(rows, codebooks.shape[1], generator)
        if is_balanced:
            codebooks[level], codes = balanced.balanced_kmeans(rows, codebooks[level])
        else:
            codes = nearest(rows, codebooks[level])
        rows = rows - codebooks[level][codes]
        values = _level_scalars(level, codes.cpu().numpy(), codebooks.shape[1])
        log(level, values | {"quantizer/reconstruction": float(rows.square().mean())})


def sinkhorn_assignment(distances: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return codes int64 (B,) that use all K codes about evenly.

    A row's code is the largest entry of its row in the entropic transport plan between rows and
    codes. The plan is computed in fp64.

    Args:
        distances: (B, K), up to a constant per row. They are divided by half the largest spread of
            a row (LC-Rec: by half their range), so that `epsilon` does not depend on the size of
            the latents.
        epsilon: strength of the regularisation (LC-Rec: 0.003).
    """
    cost = distances.double()
    cost = cost - cost.amin(1, keepdim=True)
    half_range = cost.max().clamp_min(1e-12) / 2
    plan = torch.exp(-cost / (half_range * epsilon)).clamp_min(1e-300)

    for _ in range(SINKHORN_ITERATIONS):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan.argmax(1)


def straight_through(latent: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Return `quantized`; in the backward pass, its gradient goes to `latent` unchanged."""
    return latent + (quantized - latent).detach()


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers with ReLU between them.

    He initialisation keeps the variance of the activations through the layers; torch's default does
    not.
    """
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _counts(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Return how many rows of codes (B, L) have each code, (L, K)."""
    counts = torch.zeros(codes.shape[1], num_codes, device=codes.device)
    ones = torch.ones_like(codes.T, dtype=counts.dtype)
    return counts.scatter_add_(1, codes.T, ones)  # sums of whole numbers are exact in any order


def _chunks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows in fp64, CHUNK at a time."""
    for start in range(0, len(vectors), CHUNK):
        yield np.asarray(vectors[start : start + CHUNK], np.float64)


def _convergence_warnings(errors: Sequence[float]) -> list[str]:
    """Return a warning if the last twentieth of the epochs is over 1 % better than the one before.

    With a single epoch its error is compared with 1, the error of the mean.
    """
    span = max(len(errors) // 20, 1)
    last = float(np.mean(errors[-span:]))
    earlier = errors[-2 * span : -span]
    before = float(np.mean(earlier)) if earlier else 1.0

    if last < 0.99 * before:
        return [
            f"RQ-VAE's reconstruction error was still falling at the end ({before:.4f}, then "
            f"{last:.4f}): raise --epochs"
        ]
    return []


def _level_scalars(level: int, codes: np.ndarray, num_codes: int) -> dict[str, float]:
    """Return the share of used codes and the perplexity of one level, by tag."""
    letter = LEVEL_LETTERS[level]
    share, perplexity = use_and_perplexity(codes, num_codes)
    return {f"quantizer/use_{letter}": share, f"quantizer/perplexity_{letter}": perplexity}
