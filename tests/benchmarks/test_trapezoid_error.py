"""What the trapezoid and the midpoint miss, step by step, of the sums with 64 nodes, over a whole small run.

pytest -m slow tests/benchmarks/test_trapezoid_error.py -s
"""

import numpy as np
import pytest
import torch
from models_hf import llama

from explaind_track import Explainer, Quadrature, Query, StepObserver, resolve_groups

pytestmark = pytest.mark.slow

RULES = {"midpoint": Quadrature.fixed(1), "trapezoid": Quadrature.trapezoid(), "64 nodes": Quadrature.fixed(64)}


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_error_against_64_nodes(rate: float) -> None:
    torch.manual_seed(0)
    model = llama().double()
    tokens = (torch.randint(11, (16, 1)) + torch.arange(8) * torch.randint(1, 4, (16, 1))) % 11
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    observer = StepObserver(optimizer, dict(model.named_parameters()))
    query, groups = Query.tokens(tokens[:4]).mean(), resolve_groups("type", model)
    explainers = {
        name: Explainer(model, query, groups, [("step", "group")], ("kernel", "regularization"), rule, memory=1)
        for name, rule in RULES.items()
    }
    for number in range(100):
        optimizer.zero_grad()
        batch = tokens[torch.randint(16, (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        observer.before({})
        optimizer.step()
        step = observer.after(number, {})
        for explainer in explainers.values():
            explainer.add(step)
        observer.settle()

    found = {name: explainer.results()[0].data for name, explainer in explainers.items()}
    exact = found["64 nodes"]["influence"].transpose("step", "part", "group").values.reshape(100, -1)
    for name in ("midpoint", "trapezoid"):
        own = found[name]["influence"].transpose("step", "part", "group").values.reshape(100, -1)
        errors = np.linalg.norm(own - exact, axis=1) / np.linalg.norm(exact, axis=1)
        residuals = found[name]["residual"].values
        print(
            f"\nAdamW, {rate:g}, {name}: misses the sums of 64 nodes by {np.median(errors):.1e} (median), "
            f"{np.quantile(errors, 0.95):.1e} (95%); residual {np.median(residuals):.1e}, "
            f"{np.quantile(residuals, 0.95):.1e}"
        )
    assert exact.shape == (100, 2 * len(groups))
