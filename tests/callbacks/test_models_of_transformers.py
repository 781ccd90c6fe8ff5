"""GPT-2, Llama and BERT in a loop of one's own and in the Trainer: influences are those of plain autograd on copies."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from jobs import TESTS
from loops_hf import LOOPS, VARIANTS, Variant, measure
from models_hf import FAMILIES, Family
from untracked import compare_trained

from explaind_track.errors import SampleMismatchWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore", "error::explaind_track.errors.SampleMismatchWarning"),  # of the hosts
    pytest.mark.usefixtures("closing_wandb"),
]

FAST = {
    ("own loop", "gpt2-dropout", "checkpointing"), ("own loop", "llama", "compile"), ("own loop", "bert", "lora"),
    ("own loop", "gpt2", "bfloat16"), ("trainer", "gpt2", "lora"), ("trainer", "llama", "accumulation"),
    ("trainer", "bert", "accumulation"), ("trainer", "gpt2-dropout", "smoothing"), ("trainer", "llama", "autocast"),
}  # fmt: skip
"""Those that every run of the tests has; `pytest -m slow tests/callbacks` has the others."""

UNCHANGED = {"own loop-gpt2-dropout-checkpointing", "trainer-llama-accumulation"}
"""Those whose training every run of the tests has without a Tracker, too."""

COMBINATIONS = [
    pytest.param(
        *(loop, family, variant),
        id=f"{loop}-{family.id}-{variant.id}",
        marks=[] if (loop, family.id, variant.id) in FAST else pytest.mark.slow,
    )
    for loop in LOOPS
    for family in FAMILIES
    for variant in VARIANTS
]


@contextmanager
def rounding_is_told(variant: Variant) -> Iterator[None]:
    """Samples' gradients may miss the step's under autocast, and only there; then it is said that this is why."""
    if not variant.autocast:
        yield
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    missed = [str(one.message) for one in told if one.category is SampleMismatchWarning]
    assert all("autocast" in message for message in missed)


@pytest.mark.parametrize(("loop", "family", "variant"), COMBINATIONS)
def test_influences_are_those_of_plain_autograd(loop: str, family: Family, variant: Variant, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft" if variant.lora else "accelerate")
    with rounding_is_told(variant):
        run = LOOPS[loop](family, variant, tmp_path / "t")
        errors = measure(run, tmp_path / "t")
    assert run.tracker.number == len(run.witness.steps)
    assert float(run.tracker.influence("q").residual.max()) < 0.5

    # losses are float32 in models of float64 too; forward mode and the optimizer have two digits in bfloat16
    exact = 1e-5 if loop == "trainer" or family.single else 1e-9
    assert errors.gradient <= (0.03 if variant.rounded else exact)
    assert errors.groups <= (0.1 if variant.rounded else exact)
    assert errors.samples <= (0.3 if variant.rounded else exact)


@pytest.mark.parametrize(
    ("loop", "family", "variant"),
    [
        pytest.param(*one.values, id=one.id, marks=() if one.id in UNCHANGED else pytest.mark.slow)
        for one in COMBINATIONS
    ],
)
def test_a_tracked_model_is_the_untracked_one(loop: str, family: Family, variant: Variant, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft" if variant.lora else "accelerate")
    runs, states = [], []
    for tracked, options in ((False, {}), (True, {"audit_every": 3})):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast's rounding is told by its own test
            runs.append(LOOPS[loop](family, variant, tmp_path / "t", tracked=tracked, **options))
        states.append(torch.get_rng_state())

    assert torch.equal(*states)
    plain, watched = ((run.witness.model, run.witness.optimizer) for run in runs)
    compare_trained(plain, watched)


def test_the_page_tells_of_every_combination() -> None:
    page = (TESTS / "callbacks" / "README.md").read_text()
    for loop in LOOPS:
        for family in FAMILIES:
            for variant in VARIANTS:
                assert f"| {loop} | {family.id} | {variant.id} |" in page, "run `python tests/exactness_hf.py`"
