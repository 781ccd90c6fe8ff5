"""What a second process saves, as a ratio of times in one run: influences of samples of the modulo-113 Transformer.

pytest -m slow tests/benchmarks/test_processes.py -s
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

from explaind_track import Influence, Tracker
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import sample_loss

pytestmark = pytest.mark.slow

STEPS, QUERIES, SAMPLES = 48, 200, 1000
SCRIPT = f"""
import sys
from time import perf_counter
import torch
import torch.distributed as dist
from explaind_track import Quadrature, Query, Trajectory, explain
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import GROUPS, sample_loss

dist.init_process_group("gloo")
torch.set_num_threads(1)
data = modulo_addition(113, 4000, 2000, 0)
options = dict(
    groups=GROUPS, keep=("group", "query", "sample"), quadrature=Quadrature.fixed(1), sample_loss=sample_loss,
    data=lambda index: (data.x_train[index], data.y_train[index]), samples=list(range({SAMPLES})), progress=False,
)
query = Query.outputs(data.x_test[:{QUERIES}])
dist.barrier()
started = perf_counter()
found = explain(Trajectory.open(sys.argv[1]), ModuloTransformer(), query, **options)
dist.barrier()
if dist.get_rank() == 0:
    print("seconds", perf_counter() - started)
    found.save(sys.argv[2])
dist.destroy_process_group()
"""


def test_two_processes_against_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = ModuloTransformer(), modulo_addition(113, 4000, 2000, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=4.0)
    tracker = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "t")
    for _ in range(STEPS):
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((data.x_train, data.y_train), index=torch.arange(4000))
            sample_loss(model, (data.x_train, data.y_train)).mean().backward()
            optimizer.step()
    tracker.finish()
    seconds = {count: run(count, tmp_path) for count in (1, 2)}
    one, two = (Influence.load(tmp_path / f"{count}.safetensors").data["influence"] for count in (1, 2))
    error = float(abs(one - two).max() / abs(one).max())
    print(f"\none process {seconds[1]:.1f} s, two {seconds[2]:.1f} s: {seconds[1] / seconds[2]:.2f}; error {error:.1e}")
    xr.testing.assert_allclose(one, two, rtol=0, atol=1e-6 * float(abs(one).max()))


def run(processes: int, directory: Path) -> float:
    """The seconds that the explanation takes."""
    script = directory / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(script), str(directory / "t"), str(directory / f"{processes}.safetensors")],
        cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds")))
