"""§6: trains small Llamas by the Trainer of transformers, and runs the case study on their checkpoints.

    python -m recipes.llm_pretraining [key=value …]

`out` receives summary.json, figures/, config.yaml and for each seed its texts (train.jsonl, unseen.jsonl), checkpoints/
and study/. The same command with `out=` goes on where it was stopped.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from explaind_track.checkpoints.sequences import make_sequences, parse_mixture, read_rows
from recipes import llm_data
from recipes.common import configure, output_directory
from recipes.llm_training import train


def train_one(config: DictConfig, seed: int, directory: Path) -> list[dict[str, float]]:
    """Trains the model of a seed, or goes on; returns the losses by step as the Trainer has logged them."""
    import transformers

    mixture = parse_mixture(config.data.mixture)
    if not (directory / "tokenizer").is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        corpus = llm_data.load(config.data, list(mixture), seed)
        llm_data.write_rows(directory / "train.jsonl", corpus.train)
        llm_data.write_rows(directory / "unseen.jsonl", corpus.unseen)
        llm_data.train_tokenizer(corpus.train, config.model.vocabulary).save_pretrained(directory / "tokenizer")

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "tokenizer")
    rows = read_rows(directory / "train.jsonl")
    sequences = make_sequences(rows, config.length, len(tokenizer), tokenizer.encode, tokenizer.eos_token_id)
    order = llm_data.training_order(sequences, config.steps * config.batch, mixture, seed)
    print(sequences.composition())
    return train(config, order, tokenizer, seed, directory / "checkpoints")


def main(arguments: list[str]) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of single files; the Trainer's own stays
    config = configure("llm_pretraining", arguments)
    out = output_directory(config, "llm_pretraining", resumable=True)
    for seed in config.seeds:
        train_one(config, seed, out / f"seed-{seed}")


if __name__ == "__main__":
    main(sys.argv[1:])
