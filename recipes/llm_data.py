"""Text in several languages: Python's own documentation and source code, folders of text, or a data set of the hub.

A *document* is a text, a *sequence* a row of tokens of one length, packed from documents of one language. Documents are
held out whole, so that no sentence of the unseen batch has been trained on.
"""

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from explaind_track.checkpoints.sequences import Row, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<end>"
"""The token between documents."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
"""Folders of the library that are no part of it, or hold nothing to read."""

FROM_HUB = 2000
"""Documents of each language that are taken from the hub unless the settings say how many."""

Documents = Mapping[str, Sequence[str]]
"""The documents of each language."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others that are held out, by language."""

    train: Documents
    unseen: Documents


def load(config: DictConfig, languages: Sequence[str], seed: int) -> Corpus:
    """The documents of these languages, in an order of the seed's, split; exits with a sentence for lack of them."""
    if config.path is not None and config.hub is not None:
        sys.exit("data.path= and data.hub= say two different places: leave one of them out")
    if config.hub is not None:
        documents: Documents = {language: _of_hub(config, language) for language in languages}
    elif config.path is not None:
        documents = {language: _of_folder(Path(config.path), language) for language in languages}
    else:
        documents = of_python(languages, config.documents, seed)

    train: dict[str, Sequence[str]] = {}
    unseen: dict[str, Sequence[str]] = {}
    for language, texts in documents.items():
        order = random.Random(seed).sample(texts, len(texts))[: config.documents]
        count = max(1, round(config.held_out * len(order)))
        if len(order) <= count:
            sys.exit(f"there are {len(order)} documents in {language}: too few to hold out {count} and train on others")
        unseen[language], train[language] = order[:count], order[count:]
    return Corpus(train, unseen)


# ------------------------------------------------------------------ where documents come from


def of_python(languages: Sequence[str], most: int | None, seed: int) -> Documents:
    """What every Python brings along: its docstrings and help pages (`prose`) and its modules without them (`code`).

    most: modules that are read; they are chosen by the seed.
    """
    if unknown := sorted(set(languages) - {"prose", "code"}):
        sys.exit(f"Python's own library is prose and code, not {', '.join(unknown)}; data.path= is for other languages")

    from pydoc_data.topics import topics

    found: dict[str, list[str]] = {"prose": list(topics.values()), "code": []}
    paths = library()
    for path in random.Random(seed).sample(paths, len(paths))[:most]:
        prose, code = split_docstrings(path.read_text(encoding="utf-8", errors="replace"))
        found["prose"] += [prose] if prose.strip() else []
        found["code"] += [code] if code.strip() else []
    if not found["code"]:
        sys.exit(f"there is no source code in {sysconfig.get_path('stdlib')}; data.path= says where other text is")
    return {language: found[language] for language in languages}


def library() -> list[Path]:
    """The modules of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = root.rglob("*.py")
    return sorted(path for path in paths if LEFT_OUT.isdisjoint(path.relative_to(root).parts))


def split_docstrings(source: str) -> tuple[str, str]:
    """A module's docstrings, an empty line between two, and its lines without them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # some modules of the library are templates
        return "", ""

    docstrings, prose = set[int](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            place = node.body[0]
            docstrings.update(range(place.lineno, (place.end_lineno or place.lineno) + 1))
            prose.append(text)
    code = [line for number, line in enumerate(source.splitlines(), 1) if number not in docstrings]
    return "\n\n".join(prose), "\n".join(code)


def _of_folder(root: Path, language: str) -> list[str]:
    folder = root / language
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        there = ", ".join(sorted(path.name for path in root.glob("*/"))) if root.is_dir() else "no such folder"
        sys.exit(f"data.path={root} has no texts in {language}/ (it has: {there}); name its folders in data.mixture=")
    try:
        return [text for path in paths if (text := path.read_text(encoding="utf-8")).strip()]
    except UnicodeDecodeError as error:
        sys.exit(f"{folder} holds files that are no text in UTF-8 ({error}); leave only text files there")


def _of_hub(config: DictConfig, language: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        sys.exit("data.hub= needs datasets, which is not installed: pip install 'explaind_track[recipes]'")
    try:
        rows: Any = load_dataset(config.hub, language, split="train", streaming=True)
        texts = [str(row[config.column]) for row in islice(rows, config.documents or FROM_HUB)]
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # no network, no such set, no such column
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.exit(
            f"could not load {language} of data.hub={config.hub} from the Hugging Face hub: {reason}\nTo go on, "
            "connect to the network, or say where texts are on this disk: data.path=DIRECTORY, with a folder for each "
            "language"
        )
    return texts


# ------------------------------------------------------------------ tokens


def tokenizer_in(directory: Path, rows: Sequence[Row], size: int) -> "PreTrainedTokenizerFast":
    """The tokenizer in a directory; where there is none yet, a byte-level BPE of `size` tokens, trained on the texts.

    `<end>` is one of its tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not directory.is_dir():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator((row.content for row in rows), trainer)
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def write_rows(path: Path, documents: Documents) -> None:
    """Writes documents as JSON lines, as `explaind-track checkpoints` reads them."""
    lines = (json.dumps({"text": text, "source": language}) for language, texts in documents.items() for text in texts)
    path.write_text("\n".join(lines) + "\n")


def training_order(sequences: Sequences, count: int, mixture: Mapping[str, float], seed: int) -> Sequences:
    """So many sequences by the shares of the mixture: all of a language before any of them a second time."""
    generator, taken = random.Random(seed), list[int]()
    for language, share in mixture.items():
        positions = [i for i, source in enumerate(sequences.sources) if source == language]
        number = round(share * count)
        passes = -(-number // len(positions))
        taken += [i for _ in range(passes) for i in generator.sample(positions, len(positions))][:number]
    return sequences.take(taken)
