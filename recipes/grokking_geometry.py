"""The cyclic geometry of §5.2: harmonics of maps and similarities in the difference of a + b mod p, and the Lasso.

A harmonic k of a map is what of it varies as a cosine or sine of 2πkd/p, where d is the difference of two samples'
a + b. What the paper calls frequency is the period p/k, in a + b.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from recipes.block_statistics import Series, slope
from recipes.grokking_seed import GROUP_NAMES, Claim, Number, Seed

PERIODS = range(2, 114)
"""In a + b; the paper's."""

KEY = 5
"""So many key frequencies Nanda et al. find."""

EMBEDDING, ENCODER, ATTENTION_DECODER, _, LINEAR2, DECODER = range(len(GROUP_NAMES))

Matrix = np.ndarray[Any, Any]


def residues(rows: np.ndarray, columns: np.ndarray, modulus: int) -> Matrix:
    """(a+b) − (a'+b') mod p of every pair, (rows, columns)."""
    difference: Matrix = (rows[:, None] - columns[None]) % modulus
    return difference


def harmonic_shares(values: Matrix, residue: Matrix, modulus: int) -> Matrix:
    """The share of the variance of `values` that each harmonic k = 1 … (p − 1)/2 of the residues explains, beyond what
    it explains by chance; cells that are NaN are left out.

    Exactly the best forecast from the residue alone, split by frequency where all residues are equally common.
    """
    known = ~np.isnan(values)
    cells, where = values[known].astype(np.float64), residue[known]
    cells = cells - cells.mean()
    count = np.bincount(where, minlength=modulus)
    means = np.bincount(where, cells, modulus) / np.maximum(count, 1)
    power = 2 * np.abs(np.fft.rfft(means)[1:] / modulus) ** 2
    chance = 2 / max(1, len(cells))
    shares: Matrix = power / max(float(np.square(cells).mean()), 1e-300) - chance
    return shares


def map_shares(values: Matrix, query_sums: Matrix, sample_sums: Matrix, modulus: int) -> Matrix:
    """`harmonic_shares` of a map (query, sample), once each sample's mean, its global influence, is taken out."""
    return harmonic_shares(values - values.mean(0), residues(query_sums, sample_sums, modulus), modulus)


def band_share(values: Matrix) -> float:
    """The share of a map's variance that the samples' means explain, less what they explain by chance."""
    centred = values - values.mean()
    explained = float(np.square(centred.mean(0)).mean() / max(float(np.square(centred).mean()), 1e-300))
    chance = 1 / len(values)
    return (explained - chance) / (1 - chance)


def cosine_shares(cosines: Matrix, sums: Matrix, modulus: int) -> Matrix:
    """`harmonic_shares` of a matrix of similarities (query, query); its diagonal is 1 whatever the geometry is."""
    values = cosines.astype(np.float64).copy()
    np.fill_diagonal(values, np.nan)
    return harmonic_shares(values, residues(sums, sums, modulus), modulus)


def row_cosines(values: Matrix) -> Matrix:
    """Cosines of a map's rows over the samples, (…, query, sample) → (…, query, query)."""
    rows = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-300)
    cosines: Matrix = rows @ rows.swapaxes(-1, -2)
    return cosines


def mean_harmonic(shares: Matrix) -> float:
    """The mean k, weighted by how much of the variance each explains."""
    weights = np.maximum(shares, 0)
    return float(weights @ np.arange(1, len(shares) + 1) / max(float(weights.sum()), 1e-300))


def shares_of_maps(seed: Seed) -> Matrix | None:
    """Harmonics of every map, (map, group, k)."""
    if "maps" not in seed.series:
        return None
    labels = (seed.series["map_query_sums"], seed.series["map_sample_sums"], seed.modulus)
    return np.array([[map_shares(values, *labels) for values in groups] for groups in seed.series["maps"]])


def shares_of_cosines(seed: Seed) -> Matrix:
    """Harmonics of the similarities over parameters, (window, group, k)."""
    labels = (seed.series["cosine_sums"], seed.modulus)
    cosines = seed.series["cosines/parameters"]
    return np.array([[cosine_shares(values, *labels) for values in groups] for groups in cosines])


def embedding_shares(seed: Seed) -> Matrix:
    """The share of each frequency k ≥ 1 in the embedding's Fourier norm, (window, k)."""
    norms = seed.series["fourier/embedding"][:, 1:]
    shares: Matrix = norms / norms.sum(1, keepdims=True)
    return shares


def key_frequencies(seed: Seed) -> dict[int, float]:
    """The largest frequencies of the final embedding and their shares."""
    last = embedding_shares(seed)[-1]
    return {int(k) + 1: float(last[k]) for k in np.argsort(-last)[:KEY]}


# ------------------------------------------------------------------ Lasso


def lasso(similarity: Matrix, sums: Matrix, angles: Matrix, alpha: float) -> tuple[Matrix, float, Matrix]:
    """Similarities (X, X) as a sparse sum of cosines and sines of the differences d of the samples' a + b.

    angles: by which each d is multiplied, (F,). Returns the cosines' coefficients (F,), the share of the sum of squares
    that the fit explains, and the fit (X, X).
    """
    from sklearn.linear_model import Lasso

    difference = (sums[:, None] - sums[None]).flatten()
    features = np.concatenate([function(difference[:, None] * angles) for function in (np.cos, np.sin)], 1)
    target = np.nan_to_num(similarity).flatten().astype(np.float64)
    model = Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000).fit(features, target)
    predicted = model.predict(features)
    left = np.square(target - predicted).sum() / np.square(target).sum()  # there is no intercept
    return model.coef_[: len(angles)], float(1 - left), predicted.reshape(similarity.shape)


def period_angles() -> Matrix:
    """2π/T of the paper's periods."""
    return 2 * np.pi / np.array(PERIODS)


def harmonic_angles(modulus: int) -> Matrix:
    """2πk/p for k = 0 … (p − 1)/2, which make every even function of d mod p."""
    return 2 * np.pi * np.arange(modulus // 2 + 1) / modulus


def lasso_intervals(similarity: Matrix, sums: Matrix, angles: Matrix, alpha: float, draws: int) -> Matrix:
    """The 2.5% and the 97.5% quantile of the cosines' coefficients, (2, F), and the share of draws in which each is the
    largest, (1, F): over samples drawn with repetition, a sample's pairs with its own copies left out."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        chosen = np.unique(generator.integers(len(sums), size=len(sums)))
        found.append(lasso(similarity[np.ix_(chosen, chosen)], sums[chosen], angles, alpha)[0])
    coefficients = np.array(found)
    largest = np.bincount(coefficients.argmax(1), minlength=len(angles)) / draws
    return np.concatenate([np.quantile(coefficients, [0.025, 0.975], axis=0), largest[None]])


# ------------------------------------------------------------------ claims


def _map_number(seed: Seed, measure: Any) -> Number:
    shares = shares_of_maps(seed)
    return None if shares is None else float(measure(shares))


def _bands(seed: Seed) -> Number:
    return min(band_share(groups[DECODER]) for groups in seed.series["maps"]) if "maps" in seed.series else None


def _mean_harmonic_of_maps(seed: Seed) -> Number:
    return _map_number(seed, lambda shares: mean_harmonic(shares[2, DECODER]) - mean_harmonic(shares[-1, DECODER]))


def _mean_harmonic_of_cosines(seed: Seed) -> Series | None:
    later = shares_of_cosines(seed)[seed.window_ends > seed.memorisation[1], DECODER]
    values = np.array([-mean_harmonic(shares) for shares in later])
    return Series(np.linspace(0, 1, len(values)), values) if len(values) >= 4 else None


def _first_harmonic(shares: Matrix) -> float:
    """Of all that the harmonics explain, the first one's share less the largest other's."""
    explained = np.maximum(shares, 0)
    return float((explained[0] - explained[1:].max()) / max(float(explained.sum()), 1e-300))


def _first_of_rows(seed: Seed, group: int) -> Number:
    if "maps" not in seed.series:
        return None
    cosines = row_cosines(seed.series["maps"][-1, group])
    return _first_harmonic(cosine_shares(cosines, seed.series["map_query_sums"], seed.modulus))


def _first_of_similarity(seed: Seed, group: int) -> Number:
    if "similarity" not in seed.series:
        return None
    return _first_harmonic(cosine_shares(seed.series["similarity"][group], seed.series["map_query_sums"], seed.modulus))


def _first_of_cosines(seed: Seed, group: int) -> Number:
    return _first_harmonic(shares_of_cosines(seed)[-1, group])


def _few_frequencies(seed: Seed) -> Number:
    return float(np.sort(embedding_shares(seed)[-1])[-KEY:].sum()) - 0.5


def _embedding_later(seed: Seed) -> Number:
    middle = shares_of_cosines(seed)[:, LINEAR2]
    key = int(middle[-1].argmax())
    embedding = embedding_shares(seed)[:, key]
    return (_half_way(seed, embedding) - _half_way(seed, middle[:, key])) / seed.steps


def _half_way(seed: Seed, values: Matrix) -> int:
    """The step by which a curve has come half of its way from its first value to its largest."""
    return int(seed.window_ends[np.argmax(values >= (values[0] + values.max()) / 2)])


def geometry_claims() -> Iterator[Claim]:
    rows = "sample × query maps, 50 steps"
    yield Claim(
        "each training sample has a global influence, at all stages",
        rows,
        "the least, of four maps of the decoder, of the variance that samples' means explain beyond chance",
        None,
        _bands,
    )
    yield Claim(
        "cyclic patterns emerge after the memorisation",
        rows,
        "variance of the decoder's map that the residue explains beyond chance, third map less the first",
        None,
        lambda seed: _map_number(seed, lambda s: s[2, DECODER].sum() - s[0, DECODER].sum()),
    )
    yield Claim(
        "they sharpen later",
        rows,
        "the same, last map less the third",
        None,
        lambda seed: _map_number(seed, lambda s: s[-1, DECODER].sum() - s[2, DECODER].sum()),
    )
    yield Claim(
        "their cycles become longer",
        rows,
        "mean harmonic of the decoder's map, third less last",
        None,
        _mean_harmonic_of_maps,
    )
    parameters = "authors: cosines over parameters, 50 steps"
    yield Claim(
        "their cycles become longer",
        parameters,
        "minus the slope of the decoder's mean harmonic, after the memorisation",
        slope,
        _mean_harmonic_of_cosines,
    )
    for group in (DECODER, LINEAR2):
        text = f"in the end, similarity in {GROUP_NAMES[group]} is a cosine of period p"
        definition = "the first harmonic's share of what all explain, less the largest other's"
        yield Claim(text, "paper: similarity of Γ", definition, None, partial(_first_of_similarity, group=group))
        yield Claim(text, "cosines over samples", definition, None, partial(_first_of_rows, group=group))
        yield Claim(
            text,
            parameters,
            definition,
            None,
            partial(_first_of_cosines, group=group),
        )
    yield Claim(
        "in the end, the geometry begins in the attention's decoder",
        rows,
        "variance that the residue explains in the last map, att_decoder less the larger of embedding and att_encoder",
        None,
        lambda seed: _map_number(
            seed, lambda s: s[-1, ATTENTION_DECODER].sum() - s[-1, [EMBEDDING, ENCODER]].sum(1).max()
        ),
    )
    yield Claim(
        "the model uses few key frequencies (Nanda et al.)",
        "the embedding's Fourier norms",
        "share of the five largest of its frequencies in the end, less a half",
        None,
        _few_frequencies,
    )
    yield Claim(
        "the embedding aligns with what the layers between have formed before",
        "the frequency that is largest in linear2's similarity in the end",
        "steps from half its way in linear2's similarity to half its way in the embedding's Fourier norm, of all steps",
        None,
        _embedding_later,
    )
