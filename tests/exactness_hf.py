"""Writes tests/callbacks/README.md: what is exact of models of transformers, in each combination of loop and training.

python tests/exactness_hf.py
"""

import tempfile
import warnings
from pathlib import Path

import torch
from loops_hf import LOOPS, VARIANTS, Errors, measure
from models_hf import FAMILIES

PAGE = Path(__file__).parent / "callbacks" / "README.md"
HEAD = """# Models of transformers

Written by `python tests/exactness_hf.py`, in three minutes: tiny models with random weights, four or eight steps of
AdamW, against plain autograd on copies of the model, relative to the largest number. *Gradient*: by how much the
samples, with the weights that the loop told or the callback found, miss the gradient that the optimizer saw; then the
sums over groups and over samples. Parameters are float64, under autocast float32; the losses of the models, and
Llama's norms, are float32 even so. In bfloat16, gradients have two digits, and so has the optimizer's state.

gpt2 (its head is its embedding), with dropout and without, and llama learn the next token, bert the masked ones.

| loop | model | trained | gradient | groups | samples |
|---|---|---|---|---|---|
"""


def rows() -> list[str]:
    found = []
    for loop, run in LOOPS.items():
        for family in FAMILIES:
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as directory:
                    record = Path(directory) / "t"
                    errors: Errors = measure(run(family, variant, record), record)
                numbers = " | ".join(f"{value:.0e}" for value in (errors.gradient, errors.groups, errors.samples))
                found.append(f"| {loop} | {family.id} | {variant.id} | {numbers} |")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PAGE.write_text(HEAD + "\n".join(rows()) + "\n")
    print(PAGE)
