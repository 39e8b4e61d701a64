"""Tiny models that know their answers by heart, and `ftplus eval` of them."""

from __future__ import annotations

import json

import torch
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.cli import main
from hf_ftplus.examples import collate, tokenize

ASKED = [{"prompt": f"Is {i} even?", "completion": " no, it is odd" if i % 2 else " yes, it is"} for i in range(64)]
CHOICES = [{**row, "choices": [" yes, it is", " no, it is odd"]} for row in ASKED]


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def that_says(rows, steps=90):
    """A tiny model that answers these rows as they stand: it learns them by heart."""
    model = tiny_llama().train()
    (batch,) = collate(tokenize(rows, tiny_tokenizer(), None, "rows").examples, 0, len(rows))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored(place, out, models, *flags):
    """eval.json of a command that went well."""
    assert main(["eval", *(str(place / name) for name in models), *map(str, flags), "--out", str(out)]) == 0
    assert (out / "report.html").is_file()
    return json.loads((out / "eval.json").read_text())


def rows_of(out, entry):
    return [json.loads(line) for line in (out / entry["rows_file"]).read_text().splitlines()]
