"""Semantic IDs from item embeddings: RQ-VAE, residual k-means, product quantization.

Letters in shapes: N items, D width of an embedding, L levels, K codes per level, d width of a codeword, B rows of a batch,
n rows of a k-means sample. Codes are integers in [0, K); level l's code c is written `<a_c>` for l = 0, `<b_c>` for l = 1 …

RQ-VAE: Lee et al. 2022 (arXiv:2203.01941), settings of LETTER and LC-Rec; the use for item IDs: TIGER (arXiv:2305.05065).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.semantic_ids.collisions import LEVEL_LETTERS, collision_rate, use_and_perplexity

CHUNK = 16_384  # rows that pass through memory at a time (assumed)
SAMPLE_PER_CODE = 256  # k-means learns from at most so many rows per code (faiss's default)
KMEANS_ITERATIONS = 50  # a bound; it stops when no row changes its code
SINKHORN_ITERATIONS = 50  # LC-Rec's
RESTART_WINDOW = (
    100  # steps, or an epoch if that is shorter: a code without any item in it is dead (assumed)
)
RESTART_UNTIL = 0.9  # share of the epochs; what comes after trains undisturbed (assumed)

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class QuantizerOptions:
    """How IDs are made. From `epochs` on the fields concern RQ-VAE alone."""

    levels: int = 4
    """L (MTC: 4)."""
    codes: int = 256
    """K (MTC: 256)."""
    seed: int = 0
    epochs: int = 500
    """Passes over the items; the fit says so when the error was still falling at the end."""
    learning_rate: float = 1e-3
    """Adam's, constant (LETTER, LC-Rec)."""
    batch_size: int = 1024
    hidden: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    """Widths of the encoder's hidden layers; the decoder mirrors them (LC-Rec)."""
    latent: int = 32
    """d: width of the latent space and of the codewords."""
    commitment: float = 0.25
    """Weight of the commitment term."""
    sinkhorn: float = 0.0
    """0: nearest code. Above: training assigns codes evenly within each batch by Sinkhorn with this regularisation
    (LETTER, LC-Rec: 0.003); the final IDs are the nearest codes in any case."""
    ema: float = 0.0
    """0: the codebook is trained by its gradient. Above: by an exponential moving average with this decay (usual: 0.99)."""


class Quantizer(nn.Module, ABC):
    """What all quantizers share: rows are centred and divided by one number, so that settings mean the same for any encoder.

    `mean` (D,) and `scale` () do that; scaled entries have variance 1 on average. `codebooks` (L, K, d), float32.
    """

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
        """Learn from `vectors` (N, D); return warnings."""

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Codes int64 (B, L) of scaled rows (B, D): the nearest code of each level."""

    @abstractmethod
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Scaled rows (B, D) that codes (B, L) stand for."""

    def rows(self, vectors: np.ndarray, index) -> torch.Tensor:
        """Scaled float32 rows of `vectors` at a slice or an index array, on this quantizer's device."""
        rows = torch.from_numpy(np.array(vectors[index], np.float32)).to(self.mean.device)
        return (rows - self.mean) / self.scale

    def measure_scale(self, vectors: np.ndarray) -> None:
        """Set `mean` and `scale` from all rows, in fp64 and in chunks."""
        total = np.zeros(vectors.shape[1])
        squares = 0.0
        for chunk in _chunks(vectors):
            total += chunk.sum(0)
        mean = total / len(vectors)
        for chunk in _chunks(vectors):
            squares += float(np.square(chunk - mean).sum())
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_((squares / vectors.size) ** 0.5)

    def sample(self, vectors: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        """Scaled rows (n, D) for k-means: all, or a seeded sample of SAMPLE_PER_CODE per code."""
        limit = SAMPLE_PER_CODE * self.options.codes
        if len(vectors) <= limit:
            return self.rows(vectors, slice(None))
        return self.rows(
            vectors, torch.randperm(len(vectors), generator=generator)[:limit].sort().values.numpy()
        )


class ResidualKMeans(Quantizer):
    """RQ-k-means: each level is a k-means over what the levels before it left. A row is the sum of its codewords (d = D)."""

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
        return sum(self.codebooks[level][codes[:, level]] for level in range(self.options.levels))


class ProductQuantizer(Quantizer):
    """PQ: a row is cut into L equal segments and each has a k-means of its own (MTC 5.2.3); d = D / L."""

    def __init__(self, width: int, options: QuantizerOptions):
        super().__init__(width, width // options.levels, options)

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Learn the segments' codebooks on a sample of the rows."""
        self.measure_scale(vectors)
        generator = torch.Generator().manual_seed(self.options.seed)
        error = 0.0
        for level, segment in enumerate(
            self.sample(vectors, generator).chunk(self.options.levels, dim=1)
        ):
            self.codebooks.data[level] = kmeans(segment, self.options.codes, generator)
            codes = nearest(segment, self.codebooks[level])
            error += (
                float((segment - self.codebooks[level][codes]).square().mean())
                / self.options.levels
            )
            log(level, _level_scalars(level, codes.cpu().numpy(), self.options.codes))
        log(self.options.levels - 1, {"quantizer/reconstruction": error})
        return []

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.encode`."""
        segments = rows.chunk(self.options.levels, dim=1)
        return torch.stack(
            [nearest(s, book) for s, book in zip(segments, self.codebooks, strict=True)], dim=1
        )

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.decode`."""
        return torch.cat(
            [book[codes[:, level]] for level, book in enumerate(self.codebooks)], dim=1
        )


class RQVAE(Quantizer):
    """RQ-VAE: an autoencoder whose latent (d,) is the sum of one codeword per level (Lee et al. 2022, Eq. 1-4).

    L = |x - x'|^2 + mean over levels of |sg(r) - e|^2 + commitment · |r - sg(e)|^2, all as means over entries; r is what the
    levels before left of the latent, e the chosen codeword, sg stops the gradient. The decoder sees the sum of the e, and
    its gradient goes to the latent as it is (straight-through).
    """

    def __init__(self, width: int, options: QuantizerOptions):
        super().__init__(width, options.latent, options)
        widths = [width, *options.hidden, options.latent]
        self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
        self.register_buffer("ema_count", torch.ones(options.levels, options.codes))
        self.register_buffer("ema_sum", torch.zeros_like(self.codebooks))
        self.codebooks.requires_grad_(not options.ema)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.encode`."""
        return nearest_residual(self.encoder(rows), self.codebooks)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Quantizer.decode`."""
        return self.decoder(
            sum(self.codebooks[level][codes[:, level]] for level in range(self.options.levels))
        )

    def quantize(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose codes for latents (B, d).

        Returns: codes int64 (B, L); residuals (L, B, d), each level's input, with gradient to `latent` alone; codewords
        (L, B, d), with gradient to the codebooks alone.
        """
        codes, residuals, words = [], [], []
        residual = latent
        for book in self.codebooks:
            with torch.no_grad():
                if self.options.sinkhorn:
                    code = sinkhorn_assignment(
                        _squared_distances(residual, book), self.options.sinkhorn
                    )
                else:
                    code = nearest(residual, book)
            word = functional.embedding(code, book)
            codes.append(code)
            residuals.append(residual)
            words.append(word)
            residual = residual - word.detach()
        return torch.stack(codes, 1), torch.stack(residuals), torch.stack(words)

    def losses(
        self, rows: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return the terms of the loss for scaled rows (B, D), by name, then codes (B, L) and residuals (L, B, d), detached."""
        latent = self.encoder(rows)
        codes, residuals, words = self.quantize(latent)
        reconstruction = self.decoder(straight_through(latent, words.sum(0)))
        terms = {
            "reconstruction": functional.mse_loss(reconstruction, rows),
            "commitment": functional.mse_loss(residuals, words.detach()),
        }
        terms["loss"] = terms["reconstruction"] + self.options.commitment * terms["commitment"]
        if not self.options.ema:
            terms["loss"] = terms["loss"] + functional.mse_loss(words, residuals.detach())
        return terms, codes, residuals.detach()

    def fit(self, vectors: np.ndarray, log: Log) -> list[str]:
        """Train; the start of each level's codebook is a k-means over the untrained encoder's latents."""
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
        return _convergence(errors)

    def _epoch(
        self, vectors, optimizer, generator, restart: bool
    ) -> tuple[dict[str, float], np.ndarray]:
        """One pass over all rows; return scalars and the codes int32 (N, L) as they were assigned in it."""
        device, batch_size = self.mean.device, self.options.batch_size
        order = torch.randperm(len(vectors), generator=generator).numpy()
        codes_of_item = np.empty((len(vectors), self.options.levels), np.int32)
        used = torch.zeros(self.codebooks.shape[:2], device=device)
        sums = dict.fromkeys(("loss", "reconstruction", "commitment"), 0.0)
        restarted = 0
        starts = range(0, len(order), batch_size)
        window = min(RESTART_WINDOW, len(starts))
        for step, start in enumerate(starts, 1):
            index = order[start : start + batch_size]
            terms, codes, residuals = self.losses(self.rows(vectors, index))
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimizer.step()
            if self.options.ema:
                self._move_averages(codes, residuals)
            used += _counts(codes, self.options.codes)
            if restart and step % window == 0:
                restarted += self.restart_dead(used == 0, residuals, optimizer, generator)
                used.zero_()
            codes_of_item[index] = codes.cpu().numpy()
            for name in sums:
                sums[name] = sums[name] + terms[name].detach() * len(
                    index
                )  # on the device: no wait for it each step
        values = {f"quantizer/{name}": float(value) / len(order) for name, value in sums.items()}
        return values | {"quantizer/restarted": float(restarted)}, codes_of_item

    def _move_averages(self, codes: torch.Tensor, residuals: torch.Tensor) -> None:
        """Move each codeword towards the mean of the residuals assigned to it (van den Oord et al. 2017, appendix A.1)."""
        decay = self.options.ema
        chosen = functional.one_hot(codes.T, self.options.codes).to(residuals.dtype)  # (L, B, K)
        self.ema_count.lerp_(chosen.sum(1), 1 - decay)
        self.ema_sum.lerp_(chosen.transpose(1, 2) @ residuals, 1 - decay)
        # Between visits count and sum shrink alike and the codeword stays; the bound keeps a long dead one from 0 / 0.
        self.codebooks.data = self.ema_sum / self.ema_count.clamp_min(1e-12)[..., None]

    def restart_dead(
        self, dead: torch.Tensor, residuals: torch.Tensor, optimizer, generator: torch.Generator
    ) -> int:
        """Move the codes where `dead` (L, K) bool is set to random rows of the level's `residuals` (L, B, d); return how many.

        Adam forgets what it gathered for them, and so does the moving average.
        """
        state = optimizer.state.get(self.codebooks, {})
        for level, codes in enumerate(dead.cpu()):
            codes = codes.nonzero()[:, 0]
            picked = torch.randint(residuals.shape[1], (len(codes),), generator=generator)
            at = codes.to(dead.device)
            words = residuals[level][picked.to(dead.device)]
            self.codebooks.data[level, at] = words
            self.ema_sum[level, at], self.ema_count[level, at] = words, 1.0
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][level, at] = 0.0
        return int(dead.sum())


QUANTIZERS: dict[str, type[Quantizer]] = {
    "rq-vae": RQVAE,
    "rq-kmeans": ResidualKMeans,
    "pq": ProductQuantizer,
}
"""Ways from embeddings to codes; a new one is a class and a line here."""


@dataclass(frozen=True)
class Quantized:
    """`codes` int32 (N, L), before collisions are resolved; the fitted quantizer, and what the fit has to say."""

    codes: np.ndarray
    reconstruction_error: float
    """Sum of squared errors over sum of squared distances to the mean: 0 is exact, 1 no better than the mean."""
    quantizer: Quantizer
    warnings: list[str]


def fit(name: str, vectors: np.ndarray, options: QuantizerOptions, log: Log) -> Quantized:
    """Fit a quantizer and encode all items. The same seed on the same machine gives the same codes.

    Args:
        name: a key of QUANTIZERS.
        vectors: (N, D) float, finite and not all equal; may be a memory map.
        log: takes (step, scalars named in runlog.TAGS); a step is an epoch for RQ-VAE, a level for the others.

    Raises:
        ValueError: see `check_options`.
    """
    check_options(name, options, *vectors.shape)
    device = distributed.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        quantizer = QUANTIZERS[name](vectors.shape[1], options).to(device)
        warnings = quantizer.fit(vectors, log)
    codes = np.empty((len(vectors), options.levels), np.int32)
    error = 0.0
    with torch.no_grad():
        for start in range(0, len(vectors), CHUNK):
            rows = quantizer.rows(vectors, slice(start, start + CHUNK))
            chunk = quantizer.encode(rows)
            error += float((quantizer.decode(chunk) - rows).square().sum(dtype=torch.float64))
            codes[start : start + CHUNK] = chunk.cpu().numpy()
    return Quantized(codes, error / vectors.size, quantizer, warnings)


def check_options(name: str, options: QuantizerOptions, num_items: int, width: int) -> None:
    """Raise ValueError for options that cannot work for N items of width D, naming the flag and what to do."""
    if name not in QUANTIZERS:
        raise UsageError(f"--quantizer {name}: unknown; known: {', '.join(QUANTIZERS)}")
    if not 1 <= options.levels <= len(LEVEL_LETTERS):
        raise UsageError(
            f"--levels {options.levels}: must be 1 to {len(LEVEL_LETTERS)}, a letter each"
        )
    if options.codes < 2:
        raise UsageError(f"--codes {options.codes}: must be at least 2")
    if num_items < options.codes:
        raise UsageError(
            f"--codes {options.codes}: a codebook larger than the data, which has {num_items} items; give at most {num_items}"
        )
    if name == "pq" and width % options.levels:
        raise UsageError(
            f"--quantizer pq: {options.levels} equal segments do not divide an embedding of {width} entries; "
            "choose --levels that does"
        )
    for flag, value, least in [
        ("epochs", options.epochs, 1),
        ("batch_size", options.batch_size, 1),
        ("latent", options.latent, 1),
    ]:
        if value < least:
            raise UsageError(f"--{flag} {value}: must be at least {least}")
    if options.learning_rate <= 0:
        raise UsageError(f"--lr {options.learning_rate}: must be above 0")
    if not 0 <= options.ema < 1:
        raise UsageError(f"--ema {options.ema}: a decay, 0 (off) or below 1, e.g. 0.99")
    if options.sinkhorn < 0 or options.commitment < 0:
        raise UsageError(
            f"--sinkhorn {options.sinkhorn}, --commitment {options.commitment}: must not be negative"
        )


def kmeans(rows: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from a k-means++ start: centroids (K, D) of rows (n, D).

    A cluster that runs empty takes the row that lies farthest from its centroid. With fewer different rows than codes,
    some centroids coincide and stay unused.
    """
    centroids = _plus_plus(rows, num_codes, generator)
    codes = None
    for _ in range(KMEANS_ITERATIONS):
        before, codes = codes, nearest(rows, centroids)
        if before is not None and torch.equal(before, codes):
            break
        sums, counts = torch.zeros_like(centroids), torch.zeros(num_codes, device=rows.device)
        for part, code in zip(rows.split(CHUNK), codes.split(CHUNK), strict=True):
            # A product with the one-hot codes: unlike scattered additions it sums in the same order on a GPU too.
            chosen = functional.one_hot(code, num_codes).to(rows.dtype)
            sums += chosen.T @ part
            counts += chosen.sum(0)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            distance = (rows - centroids[codes]).square().sum(1)
            sums[empty] = rows[distance.argsort(descending=True, stable=True)[: len(empty)]]
        centroids = sums / counts.clamp_min(1)[:, None]
    return centroids


def _plus_plus(rows: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each start is a row, drawn by its squared distance to the ones before."""
    norms = rows.square().sum(1)
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = torch.full_like(norms, torch.inf)
    while len(chosen) < num_codes:
        latest = rows[chosen[-1]]
        distance = torch.minimum(
            distance, (norms - 2 * (rows @ latest) + latest.square().sum()).clamp_min(0)
        )
        distance[chosen[-1]] = 0
        running = distance.cumsum(0, dtype=torch.float64)
        at = torch.rand((), generator=generator, dtype=torch.float64).to(rows.device) * running[-1]
        chosen.append(min(int(torch.searchsorted(running, at, right=True)), len(rows) - 1))
    return rows[chosen]


def residual_kmeans(
    rows: torch.Tensor, codebooks: torch.Tensor, generator: torch.Generator, log: Log
) -> None:
    """Fill `codebooks` (L, K, D) in place: level l is the k-means of what the levels before it left of rows (n, D)."""
    for level in range(len(codebooks)):
        codebooks[level] = kmeans(rows, codebooks.shape[1], generator)
        codes = nearest(rows, codebooks[level])
        rows = rows - codebooks[level][codes]
        values = _level_scalars(level, codes.cpu().numpy(), codebooks.shape[1])
        log(level, values | {"quantizer/reconstruction": float(rows.square().mean())})


def nearest(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Index int64 (B,) of the nearest codeword of `book` (K, d) to each of `rows` (B, d); the lowest of equals."""
    return torch.cat([_squared_distances(part, book).argmin(1) for part in rows.split(CHUNK)])


def nearest_residual(rows: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Codes int64 (B, L): per level the codeword nearest to what the levels before it left of rows (B, d)."""
    codes = []
    for book in codebooks:
        codes.append(nearest(rows, book))
        rows = rows - book[codes[-1]]
    return torch.stack(codes, 1)


def _squared_distances(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """|r - e|^2 - |r|^2, (B, K): what is missing is the same for all codes of a row."""
    return torch.addmm(book.square().sum(1), rows, book.T, alpha=-2)


def sinkhorn_assignment(distances: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Codes int64 (B,) that use all K codes about evenly: argmax of the entropic transport plan between rows and codes.

    Distances (B, K) up to a constant per row. They are taken relative to half the largest spread of a row (LC-Rec: half
    their range), so `epsilon` does not depend on the latents' size: 0.003 there. In fp64.
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
    """`quantized` in the forward pass; in the backward pass the gradient goes to `latent` unchanged."""
    return latent + (quantized - latent).detach()


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them. He's start keeps the variance through the layers: torch's own would lose it."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _counts(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """How many rows of codes (B, L) have each code: (L, K)."""
    counts = torch.zeros(codes.shape[1], num_codes, device=codes.device)
    return counts.scatter_add_(
        1, codes.T, torch.ones_like(codes.T, dtype=counts.dtype)
    )  # integers: any order is exact


def _chunks(vectors: np.ndarray):
    for start in range(0, len(vectors), CHUNK):
        yield np.asarray(vectors[start : start + CHUNK], np.float64)


def _convergence(errors: list[float]) -> list[str]:
    """Warn when the last twentieth of the epochs is more than 1 % better than the one before it."""
    window = max(len(errors) // 20, 1)
    before, last = (
        float(np.mean(errors[-2 * window : -window] or 1.0)),
        float(np.mean(errors[-window:])),
    )
    if last < 0.99 * before:
        return [
            f"RQ-VAE's reconstruction error was still falling at the end ({before:.4f}, then {last:.4f}): raise --epochs"
        ]
    return []


def _level_scalars(level: int, codes: np.ndarray, num_codes: int) -> dict[str, float]:
    letter = LEVEL_LETTERS[level]
    share, perplexity = use_and_perplexity(codes, num_codes)
    return {f"quantizer/use_{letter}": share, f"quantizer/perplexity_{letter}": perplexity}
