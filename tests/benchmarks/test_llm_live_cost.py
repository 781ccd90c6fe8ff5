"""What watching a language model costs while it trains: time and memory against the same loop without a Tracker.

Time in one process, a tracked and an untracked step in turn; memory in a process of its own for each (VmHWM, less what
the imports take), in units of D, the bytes of the parameters.

pytest -m slow tests/benchmarks/test_llm_live_cost.py -s
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import pytest
import torch
from jobs import child_environment
from torch import Tensor, nn

from explaind_track import Query, Tracker
from explaind_track.core.proof import WHOLLY_PROVEN

pytestmark = pytest.mark.slow

SIZES = {"8.7M": (256, 704, 8, 4_500), "60M": (512, 1536, 8, 32_000)}
"""Width, width of the MLP, layers, vocabulary of a Llama."""

TINY = (64, 64, 1, 50)
"""One that is run first, for what is imported on the way."""

BATCH, LENGTH = 4, 128

QUERIES = {"n/2": (2, 128), "n/16": (1, 32)}
"""Sequences and their length."""

GROUPS = {"7 groups": "type", "by layer": "layer"}

MOST = {"n/2": 1.0, "n/16": 0.35}
"""Extra time that was asked for, in training steps; memory: 1.3 D and the query's activations."""


def llama(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, vocabulary = SIZES.get(size, TINY)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


class Training:
    """AdamW on the same few sequences; tracked, or not."""

    def __init__(self, size: str, query: str | None = None, groups: str = "7 groups", memory: int = 2**28) -> None:
        self.model = llama(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(SIZES.get(size, TINY)[3], (BATCH, LENGTH), generator=generator)
        self.tracker: Tracker | None = None
        if query is not None:
            rows, length = QUERIES[query]
            held_out = torch.randint(SIZES.get(size, TINY)[3], (rows, length), generator=generator)
            queries = {"test": Query.tokens(held_out).mean()}
            self.tracker = Tracker(self.model, self.optimizer, queries=queries, groups=GROUPS[groups], memory=memory)

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()

    def step(self) -> None:
        if self.tracker is None:
            return self.train()
        with self.tracker.step():
            return self.train()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("size", SIZES)
def test_extra_time_in_training_steps(size: str, query: str, groups: str) -> None:
    plain, tracked = Training(size), Training(size, query, groups)
    rounds = 15 if size == "8.7M" else 5
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "tracked": []}
    for _ in range(WHOLLY_PROVEN + rounds):
        for name, training in (("plain", plain), ("tracked", tracked)):
            started = perf_counter(), process_time()
            training.step()
            seconds[name].append((perf_counter() - started[0], process_time() - started[1]))

    assert tracked.tracker is not None
    tracked.tracker.finish()
    for kind, place in (("wall", 0), ("processor", 1)):
        own, with_it = (median(pair[place] for pair in seconds[name][WHOLLY_PROVEN:]) for name in ("plain", "tracked"))
        extra = (with_it - own) / own
        print(
            f"\n{size}, {groups}, q = {query}: a training step {own:.3f} s, with a Tracker {with_it:.3f} s ({kind}): "
            f"{extra:.2f} training steps more, {MOST[query]} were asked for"
        )


SCRIPT = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
import torch, transformers
from transformers import LlamaForCausalLM
from test_llm_live_cost import Training, peak
import explaind_track.tracking.tracker
tiny = Training("tiny", "n/2", memory=1)
for _ in range(2):
    tiny.step()
tiny.tracker.finish()
before = peak()
training = Training(sys.argv[2], sys.argv[3] or None)
for _ in range(4):
    training.step()
size = sum(p.numel() * p.element_size() for p in training.model.parameters()) / 2**20
print(json.dumps({"D": size, "peak": peak() - before}))
"""


def peak() -> float:
    """VmHWM, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measured(*arguments: str) -> dict[str, Any]:
    environment = child_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed is given back
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def query_activations(size: str, query: str) -> float:
    """What the query's forward pass keeps for its backward pass, in D."""
    rows, length = QUERIES[query]
    model, kept = llama(size), dict[int, int]()
    tokens = torch.zeros(rows, length, dtype=torch.long)
    known = {p.data_ptr() for p in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(input_ids=tokens, labels=tokens)
    total = sum(kept.values()) + output.logits.numel() * 4
    return total / sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("size", SIZES)
def test_extra_memory_in_parameters(size: str, query: str) -> None:
    plain, tracked = measured(size, ""), measured(size, query)
    extra = (tracked["peak"] - plain["peak"]) / plain["D"]
    print(
        f"\n{size}, q = {query}: training's peak {plain['peak'] / plain['D']:.2f} D, with a Tracker "
        f"{tracked['peak'] / plain['D']:.2f} D: {extra:.2f} D more, {1.3 + query_activations(size, query):.2f} D were "
        "asked for (1.3 and the query's activations)"
    )
