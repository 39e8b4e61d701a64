"""See a run before it begins: rows as the model will see them, what is learnt in them, and what it will cost.

dry_run(config)           `ftplus sft --dry-run`: with the model, up to the moment of training
tasks_of(rows, config)    `ftplus data`: every task as training will see it, from the tokenizer alone
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click
from datasets import Dataset
from transformers import AutoTokenizer

from .config import RunConfig
from .data import STREAMED
from .errors import DataError, escape, reason
from .examples import Example, text_tokenizer, tokenize, window
from .formats import IGNORED
from .measured import hold_out, tasks
from .mixing import as_trained
from .model import resolve
from .output import claim, no_empty_folder
from .refusals import clipping
from .row_checks import by_task, len_of, refuse_foreign, share_supervised
from .rows import Rows
from .run import costs, in_words, prepare, speak
from .specs import TaskSpec
from .trainer import SFTTrainer
from .weights import full_shape

SHOWN = 3
"""Rows that a dry run shows in all, but one of every task."""
UNSEEN = f"streamed: the first {STREAMED} rows were looked at, none counted; any other is when its turn comes"


def dry_run(config: RunConfig) -> None:
    """Resolve everything, show rows with what is learnt in them, and what strategies will cost."""
    speak(config)

    def say(line: str) -> None:
        if config.training.process_index == 0:
            click.echo(line)

    with no_empty_folder(config.training.output_dir):
        claim(config, probe=False)
        trainer, rows = prepare(config)
        learn = trainer.train_dataset
        trainer.install(config.strategies, rows.protect or None, config.memory, config.shares)
        say(f"model     {config.model.model_name_or_path}: {count(trainer)}")
        say(f"learn     {len_of(learn)} rows{share_in_words(learn)}")
        found = by_task(learn)
        for name, part in found.items():
            for row in first(part, max(1, SHOWN // len(found))):
                of = f"{escape(name)}: " if len(found) > 1 else ""
                say(f"row       {of}{marked(row, text_tokenizer(trainer.processing_class))}")
        say(f"training  {training(trainer)}")
        for strategy in config.strategies:
            say(f"strategy  {strategy!r}")
        if said := clipping(config.strategies, config.training, bool(config.protect), bool(config.memory)):
            say(f"clipped   {said}")
        for condition in config.stop_when:
            say(f"stop when {condition}")
        if trainer.is_fsdp_enabled:
            say("measured, cost  known when training starts: until then FSDP leaves the model whole on no process")
        else:
            for task in tasks(rows, config, trainer):
                say(f"measured  {task.name} ({task.role}): {len(task.rows)} rows")
            for name, cost in costs(trainer):
                say(f"cost      {name}: {in_words(cost)}")
    say(f"Dry run: nothing was trained, nothing written to {config.training.output_dir}.")


def first(rows: Iterable[Any], most: int) -> list[Any]:
    return list(islice(rows, most))


def marked(row: Example, tokenizer: Any) -> str:
    """A row as the model sees it, with what is learnt in it between «»."""
    text = ""
    for learnt, run in groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != IGNORED):
        words = tokenizer.decode([token for token, _ in run])
        words = escape(words, len(words))
        text += f"«{words}»" if learnt else words
    return text


def share_in_words(rows: Any) -> str:
    share = share_supervised(rows)
    return "" if math.isnan(share) else f", {share:.0%} of tokens carry loss"


def count(trainer: SFTTrainer) -> str:
    sizes = [(_numbers(weight), weight.requires_grad) for weight in trainer.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    return f"{total / 1e6:.1f} M weights, {trained / 1e6:.1f} M trained, on {trainer.args.device}"


def _numbers(weight: Any) -> int:
    """Of a weight, also where it is packed to 4 bits, or in the hands of ZeRO-3."""
    packed = 2 * weight.element_size() if type(weight).__name__ == "Params4bit" else 1
    return full_shape(weight).numel() * packed


def training(trainer: SFTTrainer) -> str:
    """How long, how many rows at once and at which rate."""
    args, learn = trainer.args, trainer.train_dataset if trainer._mixture is None else trainer._mixture
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps
    if steps <= 0 and hasattr(learn, "__len__"):
        steps = math.ceil(args.num_train_epochs * math.ceil(len(learn) / rows))
    return f"{steps if steps > 0 else '?'} steps of {rows} rows, learning rate {args.learning_rate:g}"


# ---- without the model -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One task as training will see it: how many rows and tokens, and the rows that were asked for."""

    name: str
    role: str
    about: str
    shown: list[Example]

    def __str__(self) -> str:
        return f"{escape(self.name)} ({self.role}): {self.about}"


def tasks_of(rows: Rows, config: RunConfig, tokenizer: Any, most: int = 0) -> Iterator[Callable[[], Seen]]:
    """Every task that is learnt, protects or is measured, as a call that looks at it and shows up to `most` rows.

    The calls raise DataError for rows of which no tokens can be made, or nothing to learn is left by truncation.
    """
    learn = rows.learn if isinstance(rows.learn, dict) else {"learn": rows.learn}
    for name, part in learn.items():
        yield partial(_learnt, name, part, config, tokenizer, most)
    for spec in config.protect:
        if spec.generate or spec.name in rows.protect:
            most_apart = 0 if spec.name in {*rows.measured, *config.unmeasured} else config.measure_rows
            yield partial(_protecting, spec, rows.protect.get(spec.name), most_apart, config, tokenizer, most)
    for name, part in rows.measured.items():
        yield partial(_measured, name, part, config, tokenizer, most)


def _learnt(name: str, rows: Any, config: RunConfig, tokenizer: Any, most: int) -> Seen:
    args, role = config.training, _role("learn", config.shares.get(name))
    whole = isinstance(rows, Dataset)
    if whole:
        refuse_foreign(name, rows, vocabulary(config, tokenizer))
    examples = as_trained(rows if whole else Dataset.from_list(first(rows, max(1, most))), name, tokenizer, args)
    part = slice(None) if args.packing else window(args.max_length, args.truncation_mode)
    about = counted(examples, name, part) if whole else UNSEEN
    about += f"; packed to {args.max_length} ({args.packing_strategy})" if args.packing else ""
    return Seen(name, role, about, cut(examples, most, part))


def vocabulary(config: RunConfig, tokenizer: Any) -> int:
    """Tokens that the model has, which may be more than its tokenizer knows."""
    from transformers import AutoConfig

    args = config.model
    trust = {"trust_remote_code": config.training.trust_remote_code}
    made = AutoConfig.from_pretrained(resolve(args.model_name_or_path), revision=args.model_revision, **trust)
    return max(len(tokenizer), getattr(made.get_text_config(), "vocab_size", None) or 0)


def _protecting(spec: TaskSpec, rows: Dataset | None, apart: int, config: RunConfig, tokenizer: Any, most: int) -> Seen:
    """What protects, once up to `apart` rows are held out to be measured."""
    role = _role("protect", config.shares.get(spec.name))
    if rows is None:
        return Seen(spec.name, role, f"{spec.generate} rows, which the model writes when the run begins", [])
    part = window(config.training.max_length, config.training.truncation_mode)
    kept, measured = hold_out(rows, apart)
    examples = tokenize(kept, tokenizer, None, spec.name).examples
    about = counted(examples, spec.name, part)
    about += f"; {len(measured)} more are held out to be measured" if measured is not kept else ""
    return Seen(spec.name, role, about, cut(examples, most, part))


def _measured(name: str, rows: Dataset, config: RunConfig, tokenizer: Any, most: int) -> Seen:
    if rows.column_names == ["prompt"]:
        return Seen(name, "measured", f"{len(rows)} questions, which the model answers when the run begins", [])
    examples = tokenize(rows, tokenizer, None, name).examples
    part = window(config.training.max_length, config.training.truncation_mode)
    return Seen(name, "measured", counted(examples, name, part), cut(examples, most, part))


def _role(kind: str, share: float | None) -> str:
    return kind if share is None else f"{kind}, share {share:g}"


def counted(examples: Iterable[Example], name: str, part: slice) -> str:
    """Rows, tokens and supervised tokens of a task, and what truncation to `part` takes.

    Raises:
        DataError: it takes everything.
    """
    length = part.stop or -(part.start or 0)
    rows = tokens = supervised = longest = shortened = dropped = 0
    for example in examples:
        labels = example["labels"][part]
        rows, longest = rows + 1, max(longest, len(example["labels"]))
        shortened += len(labels) < len(example["labels"])
        if all(label == IGNORED for label in labels):
            dropped += 1
        else:
            tokens, supervised = tokens + len(labels), supervised + sum(label != IGNORED for label in labels[1:])
    if not supervised:
        raise DataError(
            f"{escape(name)}: none of {rows} rows has a supervised token left after truncation to max_length "
            f"{length}; the longest has {longest} tokens. Type a larger --max_length."
        )
    said = f"{rows} rows, {tokens} tokens, {supervised} supervised ({supervised / tokens:.0%}), longest {longest}"
    return said + (f"; at max_length {length} {shortened} are cut, {dropped} dropped" if length else "")


def cut(examples: Iterable[Example], most: int, part: slice) -> list[Example]:
    """The first rows, as truncation leaves them."""
    return [{key: row[key][part] for key in ("input_ids", "labels")} for row in first(examples, most)]


def load_tokenizer(config: RunConfig) -> Any:
    """The tokenizer that the trainer will have, with the tokens and the chat template that it is told to use.

    Raises:
        DataError: there is none.
    """
    model, args = config.model, config.training
    options = {"trust_remote_code": args.trust_remote_code}
    try:
        found = AutoTokenizer.from_pretrained(
            resolve(model.model_name_or_path), revision=model.model_revision, **options
        )
        if path := args.chat_template_path:
            file = Path(path)
            if file.is_file() and file.suffix in (".jinja", ".j2"):
                found.chat_template = file.read_text(encoding="utf-8")
            else:
                other = AutoTokenizer.from_pretrained(path)
                found.add_tokens(
                    [token for token in other.added_tokens_decoder.values() if token.content not in found.vocab]
                )
                found.chat_template, found.eos_token = other.get_chat_template(), other.eos_token
    except (OSError, ValueError) as error:
        raise DataError(
            f"The tokenizer of {model.model_name_or_path!r} cannot be loaded: {reason(error)} Expected a folder, "
            "a name on the Hub, or demo."
        ) from error
    found.eos_token = args.eos_token or found.eos_token
    return found
