"""Each format gives back the weights that were saved, and the optimizer whose next step is that of training."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from deepspeed_run import FILES, STAGES, Tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from explaind_track import CheckpointSeries, Tracker
from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.model_files import read_model
from explaind_track.errors import CheckpointError, CheckpointWarning


def gradient(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """AdamW of matrices that decay and vectors that do not, three steps on."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, **settings
    )
    for seed in range(3):
        gradient(model, seed)
        optimizer.step()
    return optimizer


def require_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, wanted), (_, found) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(wanted, found), name


def require_same_step(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights and next step of the checkpoint are, bit for bit, those of this model and optimizer."""
    loaded = Tiny()
    checkpoint.load(loaded)
    stepping = checkpoint.optimizer(loaded)
    assert stepping is not None
    require_equal(model, loaded)
    for one, steps in ((model, optimizer), (loaded, stepping)):
        gradient(one)
        steps.step()
    require_equal(model, loaded)


# ---------------------------------------------------------------------------------------------- DeepSpeed's files


@pytest.mark.parametrize("stage", STAGES)
def test_files_that_deepspeed_wrote(stage: str) -> None:
    """Weights and the step after them are those that DeepSpeed's own functions gave; see `deepspeed_run`."""
    expected = load_file(FILES / stage / "expected.safetensors")
    (checkpoint,) = CheckpointSeries.open(FILES / stage)
    assert (checkpoint.step, checkpoint.format) == (3, "DeepSpeed ZeRO")
    model = Tiny()
    with torch.no_grad():
        model.scale.zero_()
    checkpoint.load(model)
    assert model.scale == 2
    optimizer = checkpoint.optimizer(model)
    assert optimizer is not None
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"weight:{name}"]), name
        parameter.grad = expected.get(f"gradient:{name}")

    if stage == "stage2":  # whose gradients nobody gathers
        return
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[f"after:{name}"], rtol=1e-6, atol=1e-7)


def test_a_missing_partition_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "global_step3"
    folder.mkdir()
    for file in (FILES / "stage1" / "global_step3").iterdir():
        if "rank_1_" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="lacks 1 of 2 partitions"):
        CheckpointSeries.open(tmp_path)[0].load(Tiny())


class Neox(nn.Module):
    """The parameters of a GPT-NeoX of transformers with one layer, by their names there."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt_neox = nn.Module()
        self.gpt_neox.embed_in = nn.Embedding(5, 3)
        layer = nn.Module()
        layer.attention = nn.Module()
        layer.attention.dense = nn.Linear(3, 3)
        self.gpt_neox.layers = nn.ModuleList([layer])
        self.gpt_neox.final_layer_norm = nn.LayerNorm(3)
        self.embed_out = nn.Linear(3, 5, bias=False)


NEOX = {
    "0.word_embeddings.weight": "gpt_neox.embed_in.weight",
    "2.attention.dense.weight": "gpt_neox.layers.0.attention.dense.weight",
    "2.attention.dense.bias": "gpt_neox.layers.0.attention.dense.bias",
    "4.norm.weight": "gpt_neox.final_layer_norm.weight",
    "4.norm.bias": "gpt_neox.final_layer_norm.bias",
    "5.final_linear.weight": "embed_out.weight",
}


def write_neox(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: int, pieces: int) -> None:
    """Files in the layout of the DeeperSpeed that trained Pythia, as its readers describe it: made here, not by it."""
    folder.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    groups = [[n for n in NEOX if (parameters[NEOX[n]].ndim > 1) is matrices] for matrices in (True, False)]

    def cut(of: Any) -> list[list[list[Tensor]]]:
        """By rank, group and piece: the pieces of a group go round the ranks."""
        found: list[list[list[Tensor]]] = [[[] for _ in groups] for _ in range(ranks)]
        for place, names in enumerate(groups):
            flat = torch.cat([of(parameters[NEOX[name]]).detach().reshape(-1) for name in names])
            size = -(-len(flat) // (ranks * pieces))
            flat = torch.cat([flat, torch.full((size * ranks * pieces - len(flat),), 9.0)])
            for number, piece in enumerate(flat.split(size)):
                found[number % ranks][place].append(piece.clone())
        return found

    kinds = {kind: cut(lambda p, kind=kind: optimizer.state[p][kind]) for kind in ("exp_avg", "exp_avg_sq")}
    masters = cut(lambda p: p)
    scaler = sys.modules["deepspeed.runtime.fp16.loss_scaler"].DynamicLossScaler()
    for rank in range(ranks):
        base = [
            [{kind: kinds[kind][rank][place][piece] for kind in kinds} for piece in range(pieces)]
            for place in range(len(groups))
        ]
        state = {
            "loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": False, "base_optimizer_state": base,
            "zero_stage": 1, "partition_count": ranks, "num_comm_intervals_per_group": [pieces, pieces],
            "local_sub_partitions_of_fp32_groups": masters[rank],
        }  # fmt: skip
        shapes = {name: parameters[NEOX[name]].shape for name in NEOX}
        content = {"optimizer_state_dict": state, "param_shapes": shapes}
        torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.fixture
def scaler_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of DeepSpeed's, as far as pickling it needs one."""
    module = ModuleType("deepspeed.runtime.fp16.loss_scaler")
    made = type("DynamicLossScaler", (), {"__module__": module.__name__})
    module.DynamicLossScaler = made  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("scaler_module")
@pytest.mark.parametrize(("ranks", "pieces"), [(1, 1), (2, 1), (3, 2)])
def test_pythias_layout(tmp_path: Path, ranks: int, pieces: int) -> None:
    torch.manual_seed(0)
    model = Neox()
    optimizer = trained(model, betas=(0.9, 0.95))
    write_neox(tmp_path / "global_step3", model, optimizer, ranks, pieces)
    with pytest.raises(CheckpointError, match=r"does not tell betas, eps, lr, weight_decay of AdamW: pass settings="):
        CheckpointSeries.open(tmp_path)[0].optimizer(Neox())

    settings = {"lr": lambda step: 1e-2 * step / 3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    (checkpoint,) = CheckpointSeries.open(tmp_path, settings=settings)
    loaded = Neox()
    checkpoint.load(loaded)
    with pytest.warns(CheckpointWarning, match="the files tell none"):
        stepping = checkpoint.optimizer(loaded)
    assert stepping is not None
    for one, steps in ((model, optimizer), (loaded, stepping)):
        gradient(one)
        steps.step()
    require_equal(model, loaded)


# --------------------------------------------------------------------------------- torch.distributed, Accelerate


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("form", ["accelerate", "one folder"])
def test_folders_of_torch_distributed(tmp_path: Path, form: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(0)
    model = Tiny()
    optimizer = trained(model)
    states: dict[str, Mapping[str, Any]] = {
        "model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)
    }  # fmt: skip
    folder = tmp_path / "checkpoint_0"
    if form == "accelerate":
        dcp.save({"model": states["model"]}, checkpoint_id=folder / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": states["optimizer"]}, checkpoint_id=folder / "optimizer_0")
    else:
        dcp.save(states, checkpoint_id=folder)
    (checkpoint,) = CheckpointSeries.open(tmp_path)
    assert (checkpoint.step, checkpoint.format) == (3, "torch.distributed")
    require_same_step(checkpoint, model, optimizer)

    shard = next(folder.rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="a shard is missing or torn"):
        CheckpointSeries.open(tmp_path)[0].load(Tiny())


def test_a_table_of_contents_that_names_something_else_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "step3"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"it names os\.system.*could run any code"):
        CheckpointSeries.open(tmp_path)[0].weights()
    assert not (tmp_path / "ran").exists()


def test_folders_of_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Tiny()
    optimizer = trained(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model, optimizer, scheduler)
    accelerator.save_state(str(tmp_path / "checkpoints" / "checkpoint_0"))
    (checkpoint,) = CheckpointSeries.open(tmp_path / "checkpoints")
    assert (checkpoint.step, checkpoint.format) == (3, "Accelerate")
    require_same_step(checkpoint, model, optimizer)


# ------------------------------------------------------------------------------------------------------ OLMo, our own


class OlmoOfTransformers(nn.Module):
    """The parameters of an OLMo of transformers with one layer, by their names there."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.ModuleDict({
            "self_attn": nn.ModuleDict({f"{n}_proj": nn.Linear(4, 4, bias=False) for n in "qkvo"}),
            "mlp": nn.ModuleDict({"gate_proj": nn.Linear(4, 6, bias=False), "up_proj": nn.Linear(4, 6, bias=False),
                                  "down_proj": nn.Linear(6, 4, bias=False)}),
        })  # fmt: skip
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "layers": nn.ModuleList([layer])})


OLMO = {
    "transformer.wte.weight": ["model.embed_tokens.weight"],
    "transformer.blocks.0.att_proj.weight": [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"],
    "transformer.blocks.0.attn_out.weight": ["model.layers.0.self_attn.o_proj.weight"],
    "transformer.blocks.0.ff_proj.weight": [f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "gate")],
    "transformer.blocks.0.ff_out.weight": ["model.layers.0.mlp.down_proj.weight"],
}


def encoded(tensors: Mapping[tuple[Any, ...], Any]) -> dict[str, Tensor]:
    """Names and values as OLMo's trainer encodes them."""
    import base64
    import pickle

    found = {}
    for key, value in tensors.items():
        is_plain = not isinstance(value, Tensor)
        name = base64.urlsafe_b64encode(pickle.dumps((key, is_plain))).decode("ascii")
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if is_plain else value
        found[name] = content.detach().clone().contiguous()
    return found


def test_olmos_own_files_into_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OlmoOfTransformers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        gradient(model, seed)
        optimizer.step()
    parameters = dict(model.named_parameters())

    def fused(of: Any) -> dict[str, Tensor]:
        return {name: torch.cat([of(parameters[piece]) for piece in pieces]) for name, pieces in OLMO.items()}

    folder = tmp_path / "step3-unsharded"
    folder.mkdir()
    save_file(encoded({(name,): value for name, value in fused(lambda p: p).items()}), folder / "model.safetensors")
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    state: dict[tuple[Any, ...], Any] = {
        ("param_groups",): [{**group, "params": list(OLMO), "param_names": list(OLMO)}]
    }
    for kind in ("exp_avg", "exp_avg_sq"):
        held = fused(lambda p, kind=kind: optimizer.state[p][kind])
        state |= {("state", name, kind): value for name, value in held.items()}
    state |= {("state", name, "step"): torch.tensor(3.0) for name in OLMO}
    save_file(encoded(state), folder / "optim.safetensors")

    (checkpoint,) = CheckpointSeries.open(tmp_path)
    assert (checkpoint.step, checkpoint.format) == (3, "OLMo")
    loaded = OlmoOfTransformers()
    checkpoint.load(loaded)
    with pytest.warns(CheckpointWarning, match="OLMo sets the rate at the beginning of a step"):
        stepping = checkpoint.optimizer(loaded)
    assert stepping is not None
    for one, steps in ((model, optimizer), (loaded, stepping)):
        gradient(one)
        steps.step()
    require_equal(model, loaded)

    # the next step's rate is the user's to say
    told = CheckpointSeries.open(tmp_path, settings={"lr": 5e-3})[0].complete_optimizer(loaded)
    assert told is not None
    assert [entry["lr"] for entry in told.groups] == [5e-3]


@pytest.mark.filterwarnings("ignore::explaind_track.errors.CheckpointWarning")
def test_keyframes_of_our_own_record(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    tracker = Tracker(model, optimizer, queries={}, trajectory=tmp_path / "run", keyframe_every=2)
    for seed in range(4):
        with tracker.step():
            gradient(model, seed)
            optimizer.step()
        scheduler.step()
    tracker.finish()

    series = CheckpointSeries.open(tmp_path / "run")
    assert series.steps == [0, 2, 4]
    again = Tiny()
    series[1].load(again)
    stepping = series[1].optimizer(again)
    assert stepping is not None
    assert stepping.param_groups[0]["lr"] == 1e-2 / 4
    for seed in (2, 3):
        gradient(again, seed)
        stepping.step()
        stepping.param_groups[0]["lr"] /= 2
    require_equal(model, again)
    require_same_step(series[2], model, optimizer)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "sub/secret.safetensors", ".."])
def test_an_index_names_files_of_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "step5"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        read_model(folder)
