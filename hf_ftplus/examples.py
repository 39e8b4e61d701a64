"""Rows in, token ids and labels out: exactly those that TRL's SFTTrainer makes, and micro-batches of them.

`labels` are unshifted and -100 where unsupervised. For prompt/completion the completion is supervised (with its end of
turn or end of sequence), for text everything, for messages every turn of the assistant.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .errors import DataError, IncompatibleError, escape
from .formats import IGNORED, Row

Example = dict[str, list[int]]
"""`input_ids` and `labels`, equally long."""

CUT, UNSUPERVISED = "are cut before what is supervised", "have nothing supervised"
NAMED = 5
"""Rows of a kind whose numbers are said."""
MULTIPLE = 16
"""Widths of micro-batches are multiples of this: allocators and compiled kernels keep something for every new shape."""


PROBE = "what is said"
_IN_BLOCKS: dict[str, bool] = {}
"""Answers of `in_blocks`, by template."""


@dataclass
class Tokenized:
    """Examples that carry loss, and which rows they came from."""

    examples: list[Example]
    kept: list[int] = field(repr=False)
    """Index of the row behind each example."""
    rows: int = 0
    """Rows looked at."""
    lost: dict[str, list[int]] = field(default_factory=dict)
    """Why rows were left out, and which (by index)."""

    @property
    def dropped(self) -> int:
        """Rows left out: nothing of them is supervised, or truncation took it all; `why` tells."""
        return self.rows - len(self.kept)

    def why(self) -> str:
        """`12 are cut before what is supervised (rows 3, 7, 8, 9, 12, ...)`, by reason; counted from 1."""
        return "; ".join(f"{len(rows)} {reason} ({_numbers(rows)})" for reason, rows in self.lost.items())


def supervised_in(example: Example) -> int:
    """Tokens that carry loss: the first of a sequence is never predicted."""
    return sum(label != IGNORED for label in example["labels"][1:])


def text_tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor of text and images; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def window(length: int | None, mode: str = "keep_start") -> slice:
    """The part of a row that truncation leaves; `mode` as TRL's `truncation_mode`."""
    return slice(-length, None) if length and mode == "keep_end" else slice(length)


def tokenize(
    rows: Dataset | Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    where: str,
    mode: str = "keep_start",
) -> Tokenized:
    """Canonical rows as examples: for prompt/completion and text, exactly those that TRL's SFTTrainer makes by default.
    What is asked carries no loss, also where `completion_only_loss=False` gives it some in the learn rows: protected
    and measured is what a model says.

    `messages` are the exception, on purpose: TRL trains on every token of a conversation unless the chat template marks
    the assistant's; here every assistant turn is supervised, with the end of turn that the template writes, and
    nothing else. Sequences are cut at `max_length` as `mode` says; rows left with no supervised token are
    dropped and counted.

    Raises:
        DataError: a row that the chat template refuses, chats for a tokenizer without a template, or no token left.
        IncompatibleError: a chat template under which the assistant's turns cannot be found.
    """
    done = Tokenized([], [])
    longest = 0
    for index, row in enumerate(tqdm(rows, desc=f"tokenize {where}", unit="row", disable=None, delay=2, leave=False)):
        done.rows += 1
        example = _example(row, tokenizer, f"{where}, row {index + 1}")
        longest = max(longest, len(example["input_ids"]))
        reason = CUT if any(label != IGNORED for label in example["labels"]) else UNSUPERVISED
        example = {key: ids[window(max_length, mode)] for key, ids in example.items()}
        if any(label != IGNORED for label in example["labels"]):
            done.examples.append(example)
            done.kept.append(index)
        else:
            done.lost.setdefault(reason, []).append(index)
    if not any(map(supervised_in, done.examples)):
        raise DataError(
            f"{where}: no supervised token is left in {done.rows} rows ({done.dropped} dropped) at "
            f"max_length={max_length}; the longest row has {longest} tokens. Raise --max_length or shorten the prompts."
        )
    return done


def _numbers(rows: list[int]) -> str:
    return f"rows {', '.join(str(index + 1) for index in rows[:NAMED])}{', ...' if len(rows) > NAMED else ''}"


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    if "input_ids" in row:
        return _in_vocabulary(row, tokenizer, where)
    if "prompt" in row and "completion" not in row:
        raise DataError(
            f"{where} is a question without a completion; expected one. Questions alone serve to measure with "
            "(--measure): the starting model's own answers are then the reference."
        )
    if "prompt" in row:
        return _completion(row, tokenizer, where)
    if "messages" in row:
        return _assistant_turns(row, tokenizer, where)
    ids = tokenizer(text=_with_eos(row["text"], tokenizer))["input_ids"]
    return {"input_ids": ids, "labels": list(ids)}


def _completion(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        head = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=prompt + _with_eos(completion, tokenizer))["input_ids"]
    else:
        head = _rendered(prompt, row, tokenizer, where, generation=True)
        ids = _rendered(prompt + completion, row, tokenizer, where)
    start = _common(head, ids)
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _assistant_turns(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    """Supervise what a longer rendering adds after `... <start of the assistant's turn>`, turn by turn."""
    messages = row["messages"]
    ids = _rendered(messages, row, tokenizer, where)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:turn], row, tokenizer, where) if turn else []
        opened = _rendered(messages[:turn], row, tokenizer, where, generation=True)
        closed = _rendered(messages[: turn + 1], row, tokenizer, where)
        if ids[: len(before)] != before or ids[: len(closed)] != closed:
            raise IncompatibleError(
                f"{where}: the chat template of {_called(tokenizer)} renders earlier turns differently once more turns "
                "follow, so the assistant's turns cannot be found in the whole. Expected a template that only appends; "
                "give the data as prompt + completion (one row per answer), or such a template with "
                "--chat_template_path."
            )
        start = max(len(before), _common(opened, ids))
        labels[start : len(closed)] = ids[start : len(closed)]
    return {"input_ids": ids, "labels": labels}


def rendered(messages: list[Row], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """`apply_chat_template`, also of a model of text and images, whose template may read contents in blocks alone: of
    a string it would show nothing."""
    if in_blocks(tokenizer):
        messages = [
            {**it, "content": [{"type": "text", "text": it["content"]}]} if isinstance(it.get("content"), str) else it
            for it in messages
        ]
    return tokenizer.apply_chat_template(messages, **options)


def in_blocks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its chat template shows what stands in blocks, and nothing of a string."""

    def shows(content: Any) -> bool:
        try:
            return PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # jinja errors, and whatever a template's own raise_exception or a filter raises
            return False

    template = str(tokenizer.chat_template)
    if template not in _IN_BLOCKS:
        _IN_BLOCKS[template] = not shows(PROBE) and shows([{"type": "text", "text": PROBE}])
    return _IN_BLOCKS[template]


def template_options(row: Row) -> Row:
    """What a row says to its chat template besides the messages."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _rendered(
    messages: list[Row], row: Row, tokenizer: PreTrainedTokenizerBase, where: str, generation: bool = False
) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a chat, and the tokenizer of {_called(tokenizer)} has no chat template. Pass one with "
            "--chat_template_path, or give prompt and completion as strings."
        )
    try:
        options = {"add_generation_prompt": generation, **template_options(row)}
        return rendered(messages, tokenizer, tokenize=True, return_dict=True, **options)["input_ids"]
    except Exception as error:  # jinja errors, and whatever a template's own raise_exception or a filter raises
        roles = ", ".join(str(message.get("role")) for message in messages) or "no turn before the assistant's"
        raise DataError(
            f"{where}: the chat template of {_called(tokenizer)} refuses this chat ({escape(roles)}): "
            f"{escape(str(error), 200)}"
        ) from error


def _in_vocabulary(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Example:
    size = len(tokenizer)
    for column, low in (("input_ids", 0), ("labels", IGNORED)):
        bad = [item for item in row[column] if not (0 <= item < size or item == low)]
        if bad:
            raise DataError(
                f"{where}: {column!r} holds {bad[0]}; the vocabulary of {_called(tokenizer)} has {size} tokens."
            )
    return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token
    if not eos:
        raise IncompatibleError(f"The tokenizer of {_called(tokenizer)} has no end-of-sequence token. Set --eos_token.")
    return text if text.endswith(eos) else text + eos


def _common(one: list[int], other: list[int]) -> int:
    """Leading tokens in common: where tokens merge across the boundary, the completion starts before it, as in TRL."""
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return length
    return min(len(one), len(other))


def _called(tokenizer: PreTrainedTokenizerBase) -> str:
    return escape(str(tokenizer.name_or_path or type(tokenizer).__name__))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on its way to `device`; waited for where nobody keeps what is yet to be copied (MPS)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def collate(examples: list[Example], pad_token_id: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Micro-batches in the order given, right padded; padding is unattended and unlabelled.

    They are as wide as their longest example, rounded up to a multiple of `MULTIPLE`, but never wider than the longest
    of all examples, which the model is known to have positions for.
    """
    batches = []
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        width = max(len(example["input_ids"]) for example in group)
        width = min(-(-width // MULTIPLE) * MULTIPLE, longest)
        shape = (len(group), width)
        batch = {
            "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for i, example in enumerate(group):
            length = len(example["input_ids"])
            batch["input_ids"][i, :length] = torch.tensor(example["input_ids"])
            batch["labels"][i, :length] = torch.tensor(example["labels"])
            batch["attention_mask"][i, :length] = 1
        batches.append(batch)
    return batches
