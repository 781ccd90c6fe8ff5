"""§6: trains small Llamas by the Trainer of transformers, and runs the case study on their checkpoints.

    python -m recipes.llm_pretraining [key=value …]

`out` receives summary.json, figures/, config.yaml, and for each seed its texts (train.jsonl, unseen.jsonl),
checkpoints/ and study/. The same command with `out=` goes on where it was stopped.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import xarray as xr
from omegaconf import DictConfig

from explaind_track.analysis.checkpoint_study import Study, run_study, study_figures
from explaind_track.checkpoints.language_model import LanguageModel
from explaind_track.checkpoints.sequences import make_sequences, parse_mixture, read_rows
from explaind_track.checkpoints.series import CheckpointSeries
from recipes import llm_data
from recipes.common import configure, output_directory, save_figures, write_json
from recipes.llm_claims import Curves, tested
from recipes.llm_training import train


def require_place(config: DictConfig) -> None:
    """Exits with the reason where a GPU is asked for and there is none, or checkpoints that are nowhere."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device here"
        sys.exit(
            f"device={config.device} is asked for, and {reason}. The presets pythia and eurollm are for "
            "one GPU of 80 GB; without one, leave the preset out: a small Llama is trained and studied then"
        )
    if config.described_by is not None and config.series is None:
        sys.exit(
            f"described_by={config.described_by} is for checkpoints that are there already, and series= names none. "
            "The checkpoints of EuroLLM that the paper studies, with their optimizer states, are not public: say where "
            "yours are by series=DIR or series=hf:owner/name"
        )


# ------------------------------------------------------------------ one seed


def write_texts(config: DictConfig, seed: int, directory: Path) -> None:
    """Writes train.jsonl and unseen.jsonl of a seed, unless they are there."""
    if (directory / "unseen.jsonl").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    corpus = llm_data.load(config.data, list(parse_mixture(config.data.mixture)), seed)
    llm_data.write_rows(directory / "train.jsonl", corpus.train)
    llm_data.write_rows(directory / "unseen.jsonl", corpus.unseen)


def train_one(config: DictConfig, seed: int, directory: Path) -> CheckpointSeries:
    """Trains the model of a seed, or goes on where that was stopped; returns its checkpoints."""
    rows = read_rows(directory / "train.jsonl")
    tokenizer = llm_data.tokenizer_in(directory / "tokenizer", rows, config.model.vocabulary)
    sequences = make_sequences(rows, config.length, len(tokenizer), tokenizer.encode, tokenizer.eos_token_id)
    mixture = parse_mixture(config.data.mixture)
    order = llm_data.training_order(sequences, config.steps * config.batch, mixture, seed)
    train(config, order, tokenizer, seed, directory / "checkpoints")
    return CheckpointSeries.open(directory / "checkpoints")


def study_one(config: DictConfig, seed: int, directory: Path) -> Study:
    """Trains the model of a seed unless there is a series, and explains its checkpoints."""
    write_texts(config, seed, directory)
    series = train_one(config, seed, directory) if config.series is None else CheckpointSeries.open(config.series)

    language = LanguageModel.of(series[-1].path, config.described_by, config.device)
    mixture = parse_mixture(config.data.mixture)
    study = config.study
    return run_study(
        series,
        language,
        train=language.read(directory / "train.jsonl", study.batch, mixture, config.length, seed=seed),
        unseen=language.read(directory / "unseen.jsonl", study.unseen, mixture, config.length, seed=seed),
        out=directory / "study",
        groups=("type", "layer"),
        microbatch=study.microbatch,
        clip=config.optimizer.clip,
    )


# ------------------------------------------------------------------ all of them


def main(arguments: list[str]) -> None:
    config = configure("llm_pretraining", arguments)
    require_place(config)
    out = output_directory(config, "llm_pretraining", resumable=True)
    studies = {int(seed): study_one(config, seed, out / f"seed-{seed}") for seed in config.seeds}

    curves = {seed: Curves(study.changes["type"], study.changes["layer"]) for seed, study in studies.items()}
    claims = tested(curves)
    summary = {
        "phases": {seed: found.step_of_change() for seed, found in curves.items()},
        "claims": claims,
        "seeds": {seed: study.rows for seed, study in studies.items()},
    }
    write_json(out / "summary.json", summary)
    save_figures(out / "figures", study_figures(mean_rows(studies), over_seeds(studies)))
    report(out, summary)


def over_seeds(studies: Mapping[int, Study]) -> dict[str, xr.DataArray]:
    """The changes of the loss of all seeds, with an axis `seed`, by the name of the grouping."""
    seeds = xr.DataArray(list(studies), dims="seed", name="seed")
    groupings = next(iter(studies.values())).changes
    return {name: xr.concat([study.changes[name] for study in studies.values()], seeds) for name in groupings}


def mean_rows(studies: Mapping[int, Study]) -> list[dict[str, float]]:
    """For each checkpoint, means over the seeds: of the loss, and of the sizes of its change and residual."""
    by_checkpoint = zip(*(study.rows for study in studies.values()), strict=True)
    return [
        {
            "step": rows[0]["step"],
            "loss_before": fmean(row["loss_before"] for row in rows),
            "change": fmean(abs(row["change"]) for row in rows),
            "residual": fmean(abs(row["residual"]) for row in rows),
        }
        for rows in by_checkpoint
    ]


def report(out: Path, summary: Mapping[str, Any]) -> None:
    """Prints each claim with its numbers, and whether it holds."""
    print(
        "\nthe second phase begins at step",
        ", ".join(f"{step} (seed {seed})" for seed, step in summary["phases"].items()),
    )
    for claim in summary["claims"]:
        found = claim["seeds"].values()
        values = "; ".join(", ".join(f"{value:.3g}" for value in one["values"]) for one in found)
        holds = sum(one["holds"] for one in found)
        print(f"{claim['claim']}: holds for {holds} of {len(found)} seeds\n    {claim['number']}: {values}")
    print(f"{out / 'summary.json'}\n{out / 'figures'}")


if __name__ == "__main__":
    main(sys.argv[1:])
