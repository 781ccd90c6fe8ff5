"""What the parameters of transformers are, for real models of many architectures; and of models that are none."""

from collections.abc import Callable

import pytest
import torch
from models_hf import bert, gpt2, llama
from torch import nn

from explaind_track import resolve_groups

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2}
GATED = ["embedding", *(f"attention.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down", "norm", "head"]
FUSED = ["embedding", "attention.qkv", "attention.o", "mlp.up", "mlp.down", "norm", "head"]


def made(name: str, config: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


def t5(**settings: object) -> Callable[[], nn.Module]:
    return made("T5ForConditionalGeneration", "T5Config", **T5, **settings)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, GATED),
    "olmo": (made("OlmoForCausalLM", "OlmoConfig", **SMALL), [name for name in GATED if name != "norm"]),
    "olmo2": (made("Olmo2ForCausalLM", "Olmo2Config", **SMALL), GATED),
    "qwen2-tied": (
        made("Qwen2ForCausalLM", "Qwen2Config", **SMALL, tie_word_embeddings=True, num_key_value_heads=1),
        ["embedding+head", *GATED[1:-1]],
    ),
    "qwen3": (made("Qwen3ForCausalLM", "Qwen3Config", **SMALL, head_dim=8, num_key_value_heads=1), GATED),
    "neox": (made("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL), FUSED),
    "gpt2-tied": (gpt2, ["embedding", "embedding+head", *FUSED[1:-1]]),
    "bert-tied": (bert, ["embedding", "embedding+head", *GATED[1:5], "mlp.up", "mlp.down", "norm", "head"]),
    "bert": (made("BertModel", "BertConfig", **SMALL), [name for name in GATED if name != "mlp.gate"]),
    "t5-tied": (
        t5(),
        ["embedding+head", *GATED[1:5], "attention.position", *(f"cross_attention.{n}" for n in "qkvo"), "mlp.up",
         "mlp.down", "norm"],
    ),
    "t5-gated": (
        t5(feed_forward_proj="gated-gelu"),
        ["embedding+head", *GATED[1:5], "attention.position", *(f"cross_attention.{n}" for n in "qkvo"), *GATED[5:9]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_type_and_a_layer(name: str) -> None:
    make, types = MODELS[name]
    model = make()
    names = {name for name, _ in model.named_parameters()}
    for spec in ("type", "layer", "tensor"):
        groups = resolve_groups(spec, model)
        members = [member for group in groups.values() for member in group]
        assert len(members) == len(set(members))
        assert set(members) == names
    assert list(resolve_groups("type", model)) == types

    stacks = ["encoder", "decoder"] if name.startswith("t5") else ["layer"]
    layers = [group for group in resolve_groups("layer", model) if group.split(".")[0] in stacks]
    assert layers == [f"{stack}.{depth}" for stack in stacks for depth in (0, 1)]


def test_what_a_type_and_a_layer_hold() -> None:
    types, layers = (resolve_groups(spec, gpt2()) for spec in ("type", "layer"))
    assert types["embedding+head"] == ("transformer.wte.weight",)
    assert types["mlp.down"] == tuple(
        f"transformer.h.{n}.mlp.c_proj.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    )
    assert set(layers["layer.1"]) == {name for name, _ in gpt2().named_parameters() if ".h.1." in name}
    assert layers["norm"] == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    # by its names alone, nobody can know that the embedding is tied
    assert "embedding+head" not in resolve_groups("type", dict(gpt2().named_parameters()))


def test_layers_sort_by_depth_as_words_do() -> None:
    names = ["wte.weight", *(f"h.{n}.mlp.c_fc.weight" for n in range(12)), "ln_f.weight"]
    layers = list(resolve_groups("layer", names))[1:-1]
    assert layers == sorted(layers) == [f"layer.{n:02}" for n in range(12)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # peft asks for it
def test_adapters_are_of_the_type_of_what_they_adapt() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    types = resolve_groups("type", peft.get_peft_model(llama(), config))
    assert sum("lora" in name for name in types["attention.q"]) == 4
    assert sum("lora" in name for name in types["mlp.down"]) == 4


class Own(nn.Module):
    """No transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(()))


def test_a_model_that_is_none_has_layers_by_its_numbers_and_no_types() -> None:
    layers = resolve_groups("layer", Own())
    assert list(layers) == ["scale", "first", "blocks.0", "blocks.1"]
    assert layers["blocks.1"] == tuple(f"blocks.1.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias"))
    with pytest.raises(
        ValueError, match=r"does not know what scale, first\.weight, first\.bias, blocks.* are \(0 of 11"
    ):
        resolve_groups("type", Own())


def test_a_head_of_ones_own_is_named_in_the_error() -> None:
    model = llama()
    model.value = nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"does not know what value\.weight, value\.bias are \(21 of 23"):
        resolve_groups("type", model)


@pytest.mark.parametrize(("make", "expected"), [
    (llama, ["embed_tokens", "layers", "norm", "lm_head"]),
    (gpt2, ["wte", "wpe", "h", "ln_f"]),
    (made("BertForSequenceClassification", "BertConfig", **SMALL), ["embeddings", "encoder", "pooler", "classifier"]),
    (t5(), ["shared", "encoder", "decoder"]),
])  # fmt: skip
def test_the_default_passes_by_the_module_that_heads_are_put_on(
    make: Callable[[], nn.Module], expected: list[str]
) -> None:
    model = make()
    assert list(resolve_groups(None, model)) == expected

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    assert list(resolve_groups(None, Wrapper())) == expected
