"""`explain(out=…)` called again: the same result where the question is the same, a refusal where it is another."""

import functools
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from jobs import KEEPS, ROOT, TESTS, Job, child_environment, make_job, options_of, sample_loss
from torch import Tensor, nn

from explaind_track import Query, Trajectory, explain, open_influence
from explaind_track.errors import TrajectoryError, UncheckedContentWarning
from explaind_track.explanation.digests import Digest, model_digest
from explaind_track.record.results import Store

SCALE = 1.0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Trajectory]:
    directory = tmp_path_factory.mktemp("recorded") / "t"
    job = make_job()
    tracker = job.tracker(trajectory=directory, keyframe_every=4)
    job.run(tracker, 11)
    tracker.finish()
    return job, Trajectory.open(directory)


def made(recorded: tuple[Job, Trajectory], keep: tuple[str, ...], out: Path, **more: Any) -> xr.Dataset:
    job, trajectory = recorded
    memory = 2000 if "sample" not in keep else 12000 if "step" in keep else 10**6
    options = {**options_of(job, keep), "memory": memory, "progress": False, **more}
    query = options.pop("query", job.queries["query"])
    return explain(trajectory, options.pop("model", job.model), query, out=out, **options).data


@pytest.mark.parametrize("keep", KEEPS, ids="+".join)
def test_a_complete_result_is_given_again(
    recorded: tuple[Job, Trajectory], keep: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(recorded, keep, tmp_path / "r").load()
    written = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    monkeypatch.setattr(Trajectory, "steps_back", None)  # no step is taken again
    again = made(recorded, keep, tmp_path / "r")
    xr.testing.assert_identical(again, first)
    xr.testing.assert_identical(open_influence(tmp_path / "r").data, first)
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == written


def times(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda output: output * scale


def scaled_by_default(output: Tensor, scale: float = 1.0) -> Tensor:
    return output * scale


def scaled_by_keyword(output: Tensor, *, scale: float = 1.0) -> Tensor:
    return output * scale


def scaled_by_global(output: Tensor) -> Tensor:
    return output * SCALE


def scaled_deeply(output: Tensor) -> Tensor:
    return sum((scaled_by_global(part) for part in output.split(1)), torch.zeros(()))


class Scaled:
    """A target with state, called or by its method."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def __call__(self, output: Tensor) -> Tensor:
        return output * self.scale

    def method(self, output: Tensor) -> Tensor:
        return output * self.scale


def with_default(scale: float) -> Callable[[Tensor], Tensor]:
    def target(output: Tensor, scale: float = scale) -> Tensor:
        return output * scale

    return target


def with_keyword(scale: float) -> Callable[[Tensor], Tensor]:
    def target(output: Tensor, *, scale: float = scale) -> Tensor:
        return output * scale

    return target


def with_module(scale: float) -> nn.Module:
    module = nn.Linear(3, 3)
    nn.init.eye_(module.weight)
    nn.init.constant_(module.bias, scale)
    return module


def with_buffer(scale: float) -> nn.Module:
    module = nn.BatchNorm1d(3, affine=False)
    assert module.running_mean is not None
    module.running_mean.fill_(scale)
    return module


def with_attribute(scale: float) -> nn.Module:
    return nn.LeakyReLU(scale)


KINDS: dict[str, Callable[[float], Any]] = {
    "closure": times,
    "a tensor closed over": lambda scale: times(torch.full((3,), scale)),  # type: ignore[arg-type]
    "a list closed over": lambda scale: functools.partial(lambda scales, output: output * scales[0], [scale]),
    "partial": lambda scale: functools.partial(scaled_by_default, scale=scale),
    "default": with_default,
    "default of a keyword": with_keyword,
    "an object's state": Scaled,
    "a bound method": lambda scale: Scaled(scale).method,
    "state of state": lambda scale: Scaled(SimpleNamespace(scale=scale)),
    "a module's parameters": with_module,
    "a module's buffers": with_buffer,
    "a module's attributes": with_attribute,
    "a module's method": lambda scale: with_module(scale).forward,
    "wrapped": lambda scale: functools.wraps(scaled_by_default)(times(scale)),
    "cached": lambda scale: functools.lru_cache(times(scale)),
    "of torch's": lambda scale: torch.vmap(times(scale)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_are_told_apart_by_all_that_they_compute_with(kind: str) -> None:
    one, same, other = (Digest().add(KINDS[kind](scale), "it") for scale in (1.0, 1.0, 2.0))
    assert one.hex == same.hex != other.hex
    assert one.unknown == []


def test_functions_are_told_apart_by_the_globals_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (scaled_by_global, scaled_deeply, Scaled(1.0))
    before = [Digest().add(function, "it").hex for function in functions]
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    after = [Digest().add(function, "it").hex for function in functions]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, True, False]


def test_models_are_told_apart_by_what_they_compute_and_not_by_their_weights() -> None:
    def make(activation: nn.Module, weight: float) -> nn.Module:
        model = nn.Sequential(nn.LSTM(2, 3), activation)
        for parameter in model.parameters():
            nn.init.constant_(parameter, weight)
        return model.train(weight == 1.0)

    tanh, other_weights, relu, leaky, leakier = (
        model_digest(make(*given)).hex
        for given in (
            (nn.Tanh(), 1.0),
            (nn.Tanh(), 2.0),
            (nn.ReLU(), 1.0),
            (nn.LeakyReLU(0.1), 1.0),
            (nn.LeakyReLU(0.2), 1.0),
        )
    )
    assert tanh == other_weights
    assert len({tanh, relu, leaky, leakier}) == 4


def test_what_cannot_be_told_is_named() -> None:
    lock = threading.Lock()
    assert Digest().add(lambda output: (output, lock), "it").unknown == ["lock of it (lock)"]


SAMPLES = ("query", "output", "sample")


def reweighted(model: nn.Module, batch: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=smoothing)


OTHERS: dict[str, tuple[tuple[str, ...], Callable[[Job], dict[str, Any]]]] = {
    "sample_loss": (SAMPLES, lambda _: {"sample_loss": functools.partial(reweighted, smoothing=0.1)}),
    "data": (SAMPLES, lambda job: {"data": lambda index: (job.x[index] * 2, job.y[index])}),
    "query": (("step", "group", "query"), lambda job: {"query": Query.function(job.x[:5], times(2.0))}),
    "model": (
        ("step", "group", "query"),
        lambda job: {"model": nn.Sequential(job.model[0], nn.ReLU(), job.model[2])},  # type: ignore[index]
    ),
    "window": (("query", "output"), lambda _: {"window": (0, 9)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_answer_to_another_question_is_refused(what: str, recorded: tuple[Job, Trajectory], tmp_path: Path) -> None:
    keep, other = OTHERS[what]
    first = made(recorded, keep, tmp_path / "r")
    with pytest.raises(FileExistsError, match=f"differs in {what};"):
        made(recorded, keep, tmp_path / "r", **other(recorded[0]))
    xr.testing.assert_identical(made(recorded, keep, tmp_path / "r"), first)


def test_a_loss_whose_content_cannot_be_told_is_warned_of(recorded: tuple[Job, Trajectory], tmp_path: Path) -> None:
    lock = threading.Lock()

    def locked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with lock:
            return sample_loss(model, batch)

    with pytest.warns(UncheckedContentWarning, match="lock of sample_loss"):
        made(recorded, SAMPLES, tmp_path / "r", sample_loss=locked)


def test_two_calls_do_not_write_one_result(tmp_path: Path) -> None:
    with Store(tmp_path / "r", {"a": 1}), pytest.raises(TrajectoryError, match="is writing to"):
        Store(tmp_path / "r", {"a": 1})
    with Store(tmp_path / "r", {"a": 1}):
        pass


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def remove(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    del content[start : start + chance.randint(1, 64)]


def double(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    content[start:start] = content[start : start + chance.randint(1, 64)]


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def damage(whole: Path, scratch: Path, count: int, seed: int, read: Callable[[], Any]) -> int:
    """Damages the result in `scratch` again and again; returns how often it was read as it had been written, which it
    may be where nothing of it has changed. Any error but ValueError is one of the test."""
    chance, harmless = random.Random(seed), 0
    files = sorted(path for path in whole.iterdir() if path.is_file())
    wanted = read()
    for trial in range(count):
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        chance.choice([flip, remove, double, truncate])(content, chance)
        (scratch / path.name).write_bytes(content)
        try:
            found = read()
        except ValueError:
            pass
        except BaseException:
            print(f"trial {trial}: {path}")
            raise
        else:
            xr.testing.assert_identical(found, wanted)
            harmless += 1
        shutil.copyfile(path, scratch / path.name)
    return harmless


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [KEEPS[1], KEEPS[4]], ids="+".join)
def test_damage_to_results_is_found_or_does_no_harm(
    keep: tuple[str, ...], count: int, recorded: tuple[Job, Trajectory], tmp_path: Path
) -> None:
    made(recorded, keep, tmp_path / "r")
    shutil.copytree(tmp_path / "r", tmp_path / "s")
    harmless = damage(tmp_path / "r", tmp_path / "s", count, 4, lambda: open_influence(tmp_path / "s").data.load())
    assert harmless < count / 2  # pieces that nobody reads again, and the ends of files


def test_damage_to_what_is_gone_on_with_is_found(
    recorded: tuple[Job, Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = KEEPS[4]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(recorded, keep, tmp_path / "r")
    path = tmp_path / "r" / "influence.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"influence\.npy was altered"):
        made(recorded, keep, tmp_path / "r")


ELSEWHERE = """
import torch
from test_out_again import KINDS, Scaled
from explaind_track.explanation.digests import Digest, model_digest
kinds = [Digest().add(KINDS[kind](1.0), "it").hex for kind in sorted(KINDS)]
words = Digest().add(({"a", "b", "c", "d"}, Scaled(frozenset("efgh"))), "it").hex
print(*kinds, words, model_digest(torch.nn.Sequential(torch.nn.LSTM(2, 3), torch.nn.Tanh())).hex)
"""


@pytest.mark.slow
def test_digests_are_the_same_in_every_process() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            env=child_environment(PYTHONHASHSEED=seed, PYTHONPATH=f"{ROOT}:{TESTS}:{Path(__file__).parent}"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
