"""What scoring costs beside a bare forward pass over the same rows in the same batches: both in one process, in turn.

    .venv/bin/python examples/benchmarks/evaluation.py       prints Markdown; --help says what can be changed

The bare side calls the model, which makes a full table of logits, and looks at none of them. Ours is what `ftplus eval`
times: loss, accuracy and drift of every row, from the logits of supervised tokens alone, which are half of all, or all.
Ratios are of A B B A. OMP_NUM_THREADS=1 counts seconds of the processor.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import click
import torch
from overhead import clock, machine, paired
from transformers import AutoModelForCausalLM

from hf_ftplus.evaluation.drift import keep_head
from hf_ftplus.evaluation.found import as_found
from hf_ftplus.evaluation.scoring import Start, score
from hf_ftplus.examples import Example, collate
from hf_ftplus.model import resolve

SHORTEST, LONGEST = 16, 80


def rows(count: int, vocabulary: int, prompt: float) -> list[Example]:
    """Random tokens of many lengths; this share of each row is a prompt, which is not supervised."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw).tolist()
    ids = [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    asked = [int(prompt * len(row)) for row in ids]
    return [{"input_ids": row, "labels": [-100] * n + row[n:]} for row, n in zip(ids, asked, strict=True)]


def bare(model: torch.nn.Module, examples: list[Example], batch_size: int) -> None:
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    for batch in collate(ordered, 0, batch_size):
        del batch["labels"]
        model(**batch, use_cache=False).logits[0, 0, 0].item()


def line(name: str, tokens: int, seconds: float, ratios: list[float]) -> str:
    """Throughput of ours over that of the bare side: the inverse of the ratio of times."""
    shares = sorted(1 / ratio for ratio in ratios)
    return (
        f"| {name} | {tokens / seconds:,.0f} | {statistics.median(shares):.2f}x | {shares[0]:.2f} - {shares[-1]:.2f} |"
    )


@click.command()
@click.option("--model", "name", default="demo", show_default=True, help="Folder, Hub name, or demo.")
@click.option("--rows", "count", default=16, show_default=True, help="Scored by each side in each turn.")
@click.option("--batch-size", default=8, show_default=True, help="Rows in a batch, of both sides.")
@click.option("--pairs", default=3, show_default=True, help="Ratios of A B B A for each line, after one that warms up.")
def main(name: str, count: int, batch_size: int, pairs: int) -> None:
    """Measure how fast rows are scored, with drift and without."""
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()
    halves, wholes = (rows(count, model.config.vocab_size, prompt) for prompt in (0.5, 0.0))
    tokens, now = sum(len(example["input_ids"]) for example in halves), clock()
    click.echo(
        f"{name}, fp32, {count} rows of {SHORTEST} to {LONGEST} tokens ({tokens}), {batch_size} a batch; {machine()}"
    )
    click.echo(f"Seconds of the {'processor' if now is time.process_time else 'wall'}.\n")
    click.echo("| ours | tokens/s | throughput / bare | range |\n|---|---|---|---|")
    with as_found(model):
        for supervised, examples in (("half", halves), ("all", wholes)):
            start = Start(keep_head(model), score(model, examples, batch_size, keep_hidden=True).hidden)
            for what, more in (("loss and accuracy", {}), ("the same, and drift", {"start": start})):
                ours = partial(score, model, examples, batch_size, **more)
                ratios = paired(ours, partial(bare, model, examples, batch_size), pairs, now)
                begin = now()
                ours()
                click.echo(line(f"{what}, {supervised} supervised", tokens, now() - begin, ratios))


if __name__ == "__main__":
    main()
