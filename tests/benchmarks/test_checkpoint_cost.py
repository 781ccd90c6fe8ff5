"""What a checkpoint takes: peak memory against the HF Trainer's own step, nodes and time, and the paper's midpoints.

Each in a process of its own, for its peak (VmHWM, less what the imports take) is the process's.

pytest -m slow tests/benchmarks/test_checkpoint_cost.py -s
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import child_environment

pytestmark = pytest.mark.slow

SIZES = {"15M": (256, 768, 8, 16_000), "60M": (512, 1536, 8, 32_000)}
"""Width, width of the MLP, layers, vocabulary of a Llama."""

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from explaind_track import CheckpointSeries, Query, explain_checkpoints
from explaind_track.checkpoints import explain_checkpoints as module
from explaind_track.engine import integrator

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

what, folder = sys.argv[1], Path(sys.argv[2])
width, inner, layers, vocabulary = map(int, sys.argv[3].split(","))
config = LlamaConfig(
    vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
    num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=128,
)
generator = torch.Generator().manual_seed(1)
starts = torch.randint(vocabulary, (32, 1), generator=generator)
tokens = (starts + 7 * torch.arange(128)) % vocabulary  # to be learned
tokens = torch.where(torch.rand(32, 128, generator=generator) < 0.2, tokens.roll(3, 1), tokens)
torch.manual_seed(0)

if what == "train":
    before = peak()
    settings = TrainingArguments(
        str(folder), max_steps=int(sys.argv[4]), save_steps=int(sys.argv[4]), per_device_train_batch_size=4,
        gradient_accumulation_steps=2, report_to=[], use_cpu=True, learning_rate=1e-4, weight_decay=0.1,
        lr_scheduler_type="constant", disable_tqdm=True, logging_strategy="no", save_strategy=sys.argv[5],
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens[:16]]
    trainer = Trainer(LlamaForCausalLM(config), settings, train_dataset=rows)
    times = []
    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs): self.started = time.perf_counter()
        def on_step_end(self, *args, **kwargs): times.append(time.perf_counter() - self.started)
    trainer.add_callback(Clock())
    trainer.train()
    found = {"peak": peak() - before, "step": sorted(times)[len(times) // 2]}
else:
    def losses(logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(
            len(labels), -1).mean(1)
    if what == "midpoints":
        module.MOST_NODES = 2  # one call, of a hundred nodes
        integrator.gauss_legendre = lambda nodes: tuple(((k + 0.5) / 100, 0.01) for k in range(100))
    before = peak()
    unseen = tokens[24:28]
    data = explain_checkpoints(
        CheckpointSeries.open(folder), LlamaForCausalLM(config), groups={"type": "type", "layer": "layer"},
        train=tokens[16:24], loss=lambda model, rows: losses(model(input_ids=rows).logits, rows),
        query=Query.loss({"input_ids": unseen}, unseen, lambda output, y: losses(output.logits, y)).mean(),
        microbatch=int(sys.argv[4]), clip=1.0, progress=False,
    )["type"].data.isel(step=-1)
    names = ("loss_before", "change", "remainder", "rounding", "nodes", "seconds")
    found = {"peak": peak() - before, **{name: float(data[name]) for name in names}}
    found["parts"] = {str(part): float(data["influence"].sel(part=part).sum()) for part in data["part"].values}
print(json.dumps(found))
"""


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True, env=child_environment()
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_against_the_trainers_step(size: str, tmp_path: Path) -> None:
    shape = ",".join(map(str, SIZES[size]))
    run("train", str(tmp_path / "run"), shape, "5", "steps")
    training = run("train", str(tmp_path / "none"), shape, "3", "no")
    print(f"\n{size}: the Trainer's step (2 × 4 sequences of 128) {training['peak']:.0f} MB, {training['step']:.2f} s")
    for microbatch in ("1",) if size == "60M" else ("1", "2", "4"):
        found = run("explain", str(tmp_path / "run"), shape, microbatch)
        print(
            f"  {microbatch} at a time: {found['peak']:.0f} MB, {found['peak'] / training['peak']:.2f} of it; "
            f"{found['seconds']:.1f} s, {found['seconds'] / training['step']:.1f} of it; {_told(found)}"
        )


def test_adaptive_nodes_beside_the_papers_midpoints(tmp_path: Path) -> None:
    shape = ",".join(map(str, SIZES["15M"]))
    run("train", str(tmp_path), shape, "20", "steps")
    for what in ("explain", "midpoints"):
        found = run(what, str(tmp_path), shape, "4")
        found["nodes"] = 100 if what == "midpoints" else found["nodes"]
        print(f"\n{what}: {found['seconds']:.1f} s; {_told(found)}")


def _told(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {-value:+.3e}" for name, value in found["parts"].items())
    return (
        f"{found['nodes']:.0f} node(s), change {found['change']:+.3e} (left over {found['remainder']:+.1e}, "
        f"rounding {found['rounding']:+.1e}): {parts}"
    )
