"""Where the Trainer has a tokenizer, tables of samples show the text; not of models that read no text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models_hf import FAMILIES
from torch import Tensor

from explaind_track import Query
from explaind_track.analysis import describe_samples
from explaind_track.record.history import read_rows

transformers = pytest.importorskip("transformers")


class Tokenizer:
    """As far as the Trainer and the tables need one."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{number}>" for number in ids)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        pass


def trained(directory: Path, **options: Any) -> tuple[Any, dict[str, Tensor], list[dict[str, Any]]]:
    from explaind_track.callbacks.transformers import TrackerCallback, sample_losses

    torch.manual_seed(0)
    model, data = FAMILIES[0].make(), FAMILIES[0].data()
    query = Query.tokens({name: data[name] for name in ("input_ids", "attention_mask", "labels")}).mean()
    callback = TrackerCallback(
        queries={"test": query},
        sample_loss=sample_losses,
        index=lambda batch: batch["index"],
        trajectory=directory / "run",
        samples_every=1,
        **options,
    )
    arguments = transformers.TrainingArguments(
        str(directory), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False,
        per_device_train_batch_size=4, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{name: value[k] for name, value in data.items()} for k in range(len(data["index"]))]
    transformers.Trainer(
        model, arguments, train_dataset=rows, processing_class=Tokenizer(), callbacks=[callback]
    ).train()
    return model, data, read_rows(directory / "run")


def test_the_trainers_tokenizer_tells_the_text(tmp_path: Path) -> None:
    model, data, rows = trained(tmp_path)
    table = rows[0]["samples/most_influential"]
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert len(lines) == 4
    texts = {}
    for line in lines:
        ids, mask = (data[name][line["sample"]] for name in ("input_ids", "attention_mask"))
        texts[line["sample"]] = Tokenizer().decode(ids[mask == 1].tolist())
        assert line["text"] == texts[line["sample"]]
        assert line["prediction"].count("<") == int(mask.sum())

    # afterwards too, by the model as it is then
    def batch(index: Tensor) -> dict[str, Tensor]:
        return {name: value[index] for name, value in data.items()}

    described = describe_samples(model, texts, batch, tokenizer=Tokenizer())
    assert described["text"].to_dict() == texts
    with torch.no_grad():
        likeliest = model.eval()(data["input_ids"], attention_mask=data["attention_mask"]).logits.argmax(-1)
    sample = next(iter(texts))
    kept = likeliest[sample][data["attention_mask"][sample] == 1].tolist()
    assert described["prediction"][sample] == Tokenizer().decode(kept)
