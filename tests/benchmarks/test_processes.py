"""What a second process saves, as a ratio of times in one run: influences of samples of the modulo-113 Transformer.

pytest -m slow tests/benchmarks/test_processes.py -s
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr
from jobs import child_environment

from explaind_track import Influence, Tracker
from recipes.data import modulo_addition
from recipes.models import ModuloTransformer
from recipes.modulo_addition import sample_loss

pytestmark = pytest.mark.slow

STEPS, QUERIES, SAMPLES = 48, 200, 1000
REQUESTS = {
    "map": f"Query.outputs(x), {{'keep': ('group', 'query', 'sample'), 'samples': range({SAMPLES})}}",
    "walks": f"Query.outputs(x), {{'keep': ('query', 'sample'), 'samples': range({SAMPLES}), 'memory': 2**26}}",
    "jvp": "Query.loss(x, data.y_test[:len(x)]).mean(), {'keep': ('sample',)}",
}
"""By per-sample gradients, whose samples processes share; the same in more walks than processes, which they share; and
all 4,000 samples by JVP, whose samples they share."""

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
x = data.x_test[:{QUERIES}]
query, request = eval(sys.argv[3])
options = dict(
    groups=GROUPS, quadrature=Quadrature.fixed(1), sample_loss=sample_loss, progress=False,
    data=lambda index: (data.x_train[index], data.y_train[index]), **request,
)
dist.barrier()
started = perf_counter()
found = explain(Trajectory.open(sys.argv[1]), ModuloTransformer(), query, **options)
dist.barrier()
if dist.get_rank() == 0:
    print("seconds", perf_counter() - started)
    found.save(sys.argv[2])
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, data = ModuloTransformer(), modulo_addition(113, 4000, 2000, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=4.0)
    directory = tmp_path_factory.mktemp("run") / "t"
    tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
    for _ in range(STEPS):
        with tracker.step():
            optimizer.zero_grad()
            tracker.batch((data.x_train, data.y_train), index=torch.arange(4000))
            sample_loss(model, (data.x_train, data.y_train)).mean().backward()
            optimizer.step()
    tracker.finish()
    return directory


@pytest.mark.parametrize("asked", REQUESTS)
def test_two_processes_against_one(trajectory: Path, asked: str, tmp_path: Path) -> None:
    seconds = {count: run(count, trajectory, REQUESTS[asked], tmp_path) for count in (1, 2)}
    one, two = (Influence.load(tmp_path / f"{count}.safetensors").data["influence"] for count in (1, 2))
    error = float(abs(one - two).max() / abs(one).max())
    ratio = seconds[1] / seconds[2]
    print(f"\n{asked}: one process {seconds[1]:.1f} s, two {seconds[2]:.1f} s: {ratio:.2f}; error {error:.1e}")
    xr.testing.assert_allclose(one, two, rtol=0, atol=1e-6 * float(abs(one).max()))


def run(processes: int, trajectory: Path, request: str, directory: Path) -> float:
    """The seconds that the explanation takes."""
    script = directory / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    places = [str(trajectory), str(directory / f"{processes}.safetensors")]
    done = subprocess.run(
        [*command, str(script), *places, request],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds")))
