"""The claims about grokking: statistics on series whose truth is known, and the recipe at its smallest setting."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import block_statistics, grokking_analysis
from recipes.block_statistics import Estimate, Series, correlation, mean, of_numbers, of_series, slope
from recipes.grokking_claims import DECODER, EMBEDDING, all_claims
from recipes.grokking_geometry import (
    band_share,
    cosine_shares,
    harmonic_angles,
    lasso,
    lasso_intervals,
    map_shares,
    mean_harmonic,
    period_angles,
)
from recipes.grokking_seed import GROUP_NAMES, TENSORS, Seed
from recipes.grokking_summary import fourier_norms

Noise = Callable[[int], np.ndarray]
TRIALS = 40


@pytest.fixture
def noise() -> Noise:
    """Gives series of n numbers, each 0.7 of the one before and something new."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        values = generator.normal(size=count)
        for place in range(1, count):
            values[place] += 0.7 * values[place - 1]
        return values

    return draw


def seeds_with(noise: Noise, estimate: Estimate, effect: float) -> list[Series]:
    """Three seeds of which the statistic is `effect`, or for a correlation is above 0 if that is."""
    found = []
    for _ in range(3):
        x = noise(200) if estimate is correlation else np.linspace(0, 1, 200)
        found.append(Series(x, noise(200) + effect * (1 if estimate is mean else x)))
    return found


@pytest.mark.parametrize("estimate", [mean, slope, correlation])
def test_of_nothing_one_in_twenty_is_found(estimate: Estimate, noise: Noise) -> None:
    """And no more than chance allows: ten of forty, without the blocks, by the same autocorrelation."""
    found = [of_series(seeds_with(noise, estimate, 0), estimate, draws=39) for _ in range(TRIALS)]
    assert sum(evidence.p < 0.05 for evidence in found) <= 6  # 1 in 100 of times, were it 5%
    assert sum(evidence.low < 0 < evidence.high for evidence in found) >= 0.8 * TRIALS


@pytest.mark.parametrize("estimate", [mean, slope, correlation])
def test_what_is_there_is_found(estimate: Estimate, noise: Noise) -> None:
    planted = of_series(seeds_with(noise, estimate, 4.0), estimate, draws=99)
    assert planted.p < 1e-3
    assert planted.verdict(planted.p) == "holds"
    opposed = of_series(seeds_with(noise, estimate, -4.0), estimate, draws=99)
    assert opposed.verdict(opposed.p) == "fails"
    if estimate is not correlation:
        assert planted.low < 4 < planted.high


def test_two_rising_curves_are_not_correlated_for_that(noise: Noise) -> None:
    rise = np.linspace(0, 20, 400)
    left, right = (block_statistics.detrended(rise + noise(400), 101) for _ in range(2))
    assert correlation(rise, rise + noise(400)) > 0.95
    assert of_series([Series(left, right)], correlation, draws=99).p > 0.05


def test_seeds_alone_give_no_smaller_p_than_their_signs() -> None:
    assert of_numbers([1.0, 2.0, 3.0]).p == 2**-3
    evidence = of_numbers([1.0, 2.0, 3.0])
    assert (evidence.low, evidence.high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)  # t = 4.303, s = 1
    assert evidence.verdict(evidence.p) == "undecided"
    assert of_numbers([1.0] * 10).p == 2**-10


def test_corrected_p_values_are_holms() -> None:
    assert block_statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# ------------------------------------------------------------------ geometry


def test_a_planted_harmonic_is_all_that_a_map_has() -> None:
    queries, samples = np.arange(62), np.arange(5, 160)
    values = np.cos(2 * np.pi * 4 * (queries[:, None] - samples[None]) / 31) + samples  # with a global influence
    shares = map_shares(values, queries, samples, 31)
    assert shares[3] > 0.98
    assert mean_harmonic(shares) == pytest.approx(4, abs=0.1)
    assert band_share(values) > 0.99

    random = np.random.default_rng(0).normal(size=values.shape)
    assert abs(map_shares(random, queries, samples, 31).sum()) < 0.01
    assert abs(band_share(random)) < 0.03


def test_the_lasso_finds_the_period_it_was_given_in_every_draw() -> None:
    sums = np.arange(0, 220, 7)
    similarity = np.cos(2 * np.pi * (sums[:, None] - sums[None]) / 113)
    coefficients, share, _ = lasso(similarity, sums, period_angles(), 1e-3)
    assert coefficients.argmax() + 2 == 113
    assert share > 0.99
    low, high, largest = lasso_intervals(similarity, sums, harmonic_angles(113), 1e-3, draws=5)
    assert largest[1] == 1
    assert low[1] <= high[1] <= 1
    assert cosine_shares(similarity, sums, 113).argmax() == 0


def test_an_embedding_of_two_frequencies_has_these() -> None:
    number = torch.arange(31.0)
    waves = [torch.cos(2 * torch.pi * 3 * number / 31), 0.5 * torch.sin(2 * torch.pi * 7 * number / 31)]
    norms = fourier_norms(torch.stack([*waves, torch.zeros(31)], 1))
    assert norms.argsort()[-2:].tolist() == [7, 3]
    assert norms[3] / norms[7] == pytest.approx(4)


# ------------------------------------------------------------------ claims


def seed_as_told(sign: int) -> Seed:
    """A seed of 800 steps that does what the paper says of layers, or the opposite."""
    generator = np.random.default_rng(0)
    evaluated = np.arange(10, 801, 10)
    time = np.arange(800) / 800
    importance = np.ones((800, 6, 2))
    importance[..., 0] += 0.01 * generator.normal(size=(800, 6))
    importance[:, DECODER, 0] += sign * (0.5 - 0.4 * (time > 0.3) + 0.3 * np.clip(time - 0.4, 0, None))
    importance[:, EMBEDDING, 0] += sign * 0.3 * np.clip(time - 0.3, 0, None)
    total = np.stack([np.ones(800), 1 + sign * 0.1 + 0.01 * generator.normal(size=800)], 1)
    targets = ("outputs", "loss", "margin")
    tensors = np.ones((16, sum(TENSORS), 2))
    tensors[:, 0, 1] += sign * 0.5
    series = {
        "evaluated": evaluated,
        "accuracy/train": np.clip(evaluated / 240, 0, 1),
        "accuracy/test": np.clip((evaluated - 300) / 480, 0, 1) if sign > 0 else np.clip(evaluated / 480, 0, 1),
        "parameters/tensors": tensors + 0.001 * generator.normal(size=tensors.shape),
        "parameters/groups": np.ones((16, 6, 2)),
        "cosines/parameters": np.tile(np.eye(8), (16, 6, 1, 1)),
        "cosine_sums": np.arange(8),
        "fourier/embedding": generator.random((16, 57)),
        "accumulated/outputs": importance.cumsum(0),
    }
    series |= {f"importance/{target}": importance for target in targets}
    series |= {f"influence/{target}": importance for target in targets}
    series |= {f"total/{target}": total for target in targets}
    return Seed(1, series, 50, 113)


@pytest.mark.parametrize("sign", [1, -1])
def test_claims_hold_of_a_run_that_is_as_told_and_fail_of_its_opposite(sign: int) -> None:
    seeds = [seed_as_told(sign)]
    found = {(claim.text, claim.quantity): grokking_analysis.evidence_for(claim, seeds, 39) for claim in all_claims()}
    outputs = "Ψ̄ of all log-probabilities"
    for text, quantity in (
        ("in the final phase, the regularization dominates", "Ψ̄_s(Θ), Ψ̄^reg_s(Θ) of the margin"),
        ("the decoder is the most influential layer in the memorisation", outputs),
        ("the decoder is the most influential layer in the memorisation", "authors: differences of accumulated |Ψ|"),
        ("the embedding's influence grows until the end", outputs),
        (
            "regularization dominates in the embedding while the circuit forms",
            "Σ_θ |Ψ| − |Ψ^reg| over single parameters",
        ),
    ):
        spoken = found[text, quantity]
        assert spoken is not None
        assert (spoken[0].low > 0) if sign > 0 else (spoken[0].high < 0), text
    assert found["they sharpen later", "sample × query maps, 50 steps"] is None  # there are no maps


# ------------------------------------------------------------------ the recipe


def test_seeds_are_trained_explained_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grokking_analysis.main(["preset=smoke", "seeds=1", f"out={out}"])
    (file, maps) = sorted((out / "seeds").iterdir(), reverse=True)
    assert [file.name, maps.name] == ["series-1.safetensors", "maps-1.safetensors"]  # and no record
    before = file.stat().st_mtime_ns
    config = grokking_analysis.configure("grokking_analysis", ["preset=smoke", "seeds=2"])
    one, other = grokking_analysis.obtain(config, out / "seeds")
    assert file.stat().st_mtime_ns == before
    assert not np.array_equal(one.series["total/loss"], other.series["total/loss"])

    found = json.loads((out / "summary.json").read_text())
    assert [row["seed"] for row in found["courses"]] == [1]
    assert {row["verdict"] for row in found["claims"]} <= {"holds", "fails", "undecided"}
    texts = {row["claim"] for row in found["claims"]}
    assert (out / "claims.md").read_text().count("\n") == len(texts) + len(found["claims"]) + 5
    figures = {path.stem for path in (out / "figures").glob("*.png")}
    assert figures == {"phases", "differences", "frequencies", "lasso", "maps", "cosines"}

    # forward mode, a group at a time, and backward mode, a parameter at a time, say the same of the first window
    forward = one.series["accumulated/outputs summed"][one.window - 1]
    assert one.series["parameters/groups"][0] == pytest.approx(forward, rel=1e-6)
    assert one.series["importance/outputs"].shape == (one.steps, len(GROUP_NAMES), 2)
    with pytest.raises(SystemExit, match="window"):
        grokking_analysis.main(["preset=smoke", "window=5", f"out={out}"])
