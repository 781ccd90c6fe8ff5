"""Sample × query maps of a recorded run, and the similarity of §4: what needs gradients of single training samples."""

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from explaind_track import Quadrature, Query, explain
from explaind_track.analysis import similarity
from explaind_track.engine.memory import MEMORY
from recipes.common import Run
from recipes.data import sums_of
from recipes.modulo_addition import GROUPS, sample_loss

LOOK_BACK = 90
"""Steps before a window from which momentum still leads into it: 0.9^90 = 8e-5 of a gradient is left."""

LOOK_BACK_FOR_SQUARES = 40
"""The same where gradients enter by their squares, 0.9^80 = 2e-4, for each of these steps takes a second."""


def maps(config: DictConfig, run: Run) -> dict[str, np.ndarray]:
    """Ψ_S(Θ_layer, x_k, x), the outputs summed, for windows S that end at fractions of the run (map, group, query,
    sample); and at the last of these §4's similarity, of the right answer's log-probability: (group, query, query)."""
    x, y = run.data.x_test[: config.map_queries], run.data.y_test[: config.map_queries]
    samples = range(config.map_samples)
    ends = [max(1, round(fraction * len(run.trajectory))) for fraction in config.windows]
    found = []
    for end in tqdm(ends, "maps", unit="window"):
        window = (max(0, end - config.window), end)
        steps = list(run.trajectory.steps(max(0, window[0] - LOOK_BACK), end, lasting=True))
        influence = explain(
            steps,
            run.model,
            Query.outputs(x),
            groups=GROUPS,
            keep=("group", "query", "sample"),
            window=window,
            quadrature=Quadrature.fixed(1),
            sample_loss=sample_loss,
            data=run.data.training_batch,
            samples=samples,
            progress=False,
        )
        found.append(influence.data["influence"].transpose("group", "query", "sample").values)

    last = (max(0, ends[-1] - config.similarity_window), ends[-1])
    similar = similarity(
        [step for step in steps if step.number >= last[0] - LOOK_BACK_FOR_SQUARES],
        run.model,
        Query(x, lambda output, y: output.gather(1, y[:, None]), (y,)),
        sample_loss=sample_loss,
        data=run.data.training_batch,
        groups=GROUPS,
        window=last,
        samples=samples,
        quadrature=Quadrature.fixed(1),
        memory=4 * MEMORY,  # each chunk of samples goes through all the batch's gradients
        progress=False,
    )
    return {
        "maps": np.stack(found).astype(np.float32),
        "map_ends": np.array(ends),
        "map_query_sums": sums_of(x),
        "map_sample_sums": sums_of(run.data.x_train[: config.map_samples]),
        "similarity": similar.values,
    }
