"""How well a batch tells whether states are their parameters': of five architectures, early and late, by few sequences
and by many. Right states that are called wrong, states in another order, and pairs of matrices that were exchanged.

pytest -m slow tests/benchmarks/test_states_told_apart.py -s
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from explaind_track.checkpoints.state_match import match_states

pytestmark = pytest.mark.slow

STEPS, BATCHES, EXCHANGES = (1, 3, 10, 40, 150), (1, 2, 8, 32), 4
VOCABULARY, LENGTH = 256, 64

Moments = dict[str, Tensor]


def models() -> Iterator[tuple[str, nn.Module]]:
    import transformers as hf

    common = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {**common, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    yield "llama", hf.LlamaForCausalLM(hf.LlamaConfig(**wide, num_key_value_heads=2))
    yield "gpt2", hf.GPT2LMHeadModel(hf.GPT2Config(**common, n_embd=32, n_layer=4, n_head=2, n_positions=LENGTH))
    yield "neox", hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**wide))
    tied = {**wide, "num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    yield "qwen2-tied", hf.Qwen2ForCausalLM(hf.Qwen2Config(**tied))
    yield "bert", hf.BertLMHeadModel(hf.BertConfig(**wide, is_decoder=True))


def text() -> Tensor:
    """The letters of Python's own help pages, in sequences."""
    from pydoc_data.topics import topics

    letters = torch.tensor(list("".join(topics.values()).encode()))
    sequences = letters[: len(letters) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))]


def gradient(model: nn.Module, batch: Tensor) -> Moments:
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpoints(model: nn.Module) -> Iterator[tuple[int, int, Moments, Moments]]:
    """Steps, sequences in the batch, second moments, and that batch's gradient."""
    data = text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, max(STEPS) + 1):
        start = 8 * step % (len(data) - 100)
        gradient(model, data[start : start + 8])
        optimizer.step()
        if step in STEPS:
            second = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
            for count in BATCHES:
                yield step, count, second, gradient(model, data[-count:])


def in_another_order(second: Moments, generator: random.Random) -> Moments:
    shapes: dict[torch.Size, list[str]] = {}
    for name, value in second.items():
        shapes.setdefault(value.shape, []).append(name)
    places = {
        n: other for own in shapes.values() for n, other in zip(own, generator.sample(own, len(own)), strict=True)
    }
    return {name: second[places[name]] for name in second}


def test_how_well_a_batch_tells() -> None:
    wrong = count = exchanged = found = 0
    right_chances, other_chances = [], []
    for name, model in models():
        generator = random.Random(0)
        for step, sequences, second, own in checkpoints(model):
            right = match_states(second, own)
            other = match_states(in_another_order(second, generator), own)
            wrong, count = wrong + bool(right.misplaced), count + 1
            right_chances.append(right.chance)
            other_chances.append(other.chance)

            matrices = [n for n in second if second[n].ndim > 1]
            told = 0
            for _ in range(EXCHANGES):
                one = generator.choice(matrices)
                same = [n for n in matrices if n != one and second[n].shape == second[one].shape]
                if same:
                    two = generator.choice(same)
                    moved = match_states({**second, one: second[two], two: second[one]}, own).misplaced
                    told, exchanged = told + ({one, two} <= set(moved)), exchanged + 1
            found += told
            print(
                f"{name:10} step {step:3}, {sequences:2} sequences: chance {right.chance:.3f} right, "
                f"{other.chance:.3f} in another order; correlation {right.correlation:.2f}, {other.correlation:.2f}; "
                f"called wrong {len(right.misplaced)}, told {len(other.misplaced)}; exchanged pairs told {told}"
            )
    print(
        f"{count} checkpoints: {wrong} right ones called wrong; exchanged pairs told {found} of {exchanged}; chance of "
        f"right ones at most {max(right_chances):.3f}, in another order at least {min(other_chances):.3f}"
    )
