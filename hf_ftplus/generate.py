"""Let the starting model write the data that stands for what it knows: `--protect self:256`.

A chat model is given its own template opened at the user's turn, and nothing in it: what it writes next is a request of
the kind it was tuned on. Then it answers. A base model starts from its first token and writes text. This is the prompt
of Magpie (Xu 2024, arXiv:2406.08464), used to remember rather than to align.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from .data import load
from .disk import write
from .errors import DataError, UsageError
from .examples import rendered
from .fingerprint import architecture, fingerprint, tokenizer_fingerprint
from .formats import Row
from .logits import causal_lm, evaluating, positions, reshard
from .weights import sharded

FORMAT = 3
"""Part of the cache key: raise it when the same settings come to give other rows."""
TRIES = 8
"""Rows sampled per row wanted, in whole batches, before giving up."""
SPARE = 4
"""Rows written beyond those still wanted, since some are empty or were seen before."""
CANDIDATES = 1024
"""Likeliest tokens among which the nucleus is looked for first: it is nearly always there, and a vocabulary sorted at
every step costs more than the model."""
AFTER = 4
"""Tokens, of all rows at once, after which it is said how long the rest will take."""
USER = "ftplususerturn"
"""Stands for the user's words while the template is cut open; plain letters, so that no template trims it."""

logger = logging.getLogger("hf_ftplus")


@dataclass(frozen=True)
class Sampling:
    """How the model writes.

    At temperature 1 and top_p 1 the rows are drawn from the model's very own distribution. The default leaves out the
    least likely twentieth of each step: in a small model that tail is mostly noise, and one token of it derails the
    rest of the row.
    """

    batch_size: int = 64
    max_new_tokens: int = 96
    """Longest answer (`self:64x48`: 48); text of a base model may be as long as request and answer together."""
    request_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and (name != "top_p" or value <= 1)):
                limit = "above 0, at most 1" if name == "top_p" else "above 0"
                raise UsageError(f"{name} is {value!r}; expected {limit}.")


def self_generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = Sampling.batch_size,
    max_new_tokens: int = Sampling.max_new_tokens,
    request_tokens: int = Sampling.request_tokens,
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    cache: Path | None = None,
    progress: bool = True,
) -> Dataset:
    """`count` rows written by `model` as it stands: prompt + completion (messages), or text without a chat template.

    The model's mode and settings and every global random generator are left as found. With `cache`, a folder, the rows
    are kept there under a key made of the model's content, the tokenizer, the template and all settings. `autocast` is
    mixed precision to write in: in bf16 some words differ from fp32's, and the pass takes a fraction of the time.

    Raises:
        UsageError: a count or setting out of range.
        DataError: the model keeps writing nothing, or only what it wrote before.
    """
    how = Sampling(batch_size, max_new_tokens, request_tokens, temperature, top_p)
    if count < 1:
        raise UsageError(f"{count} rows of self-generated text; expected 1 or more, such as self:256.")
    with autocast():
        file = None if cache is None else Path(cache) / f"self-{_key(model, tokenizer, count, seed, how)}.jsonl"
    if file is not None and (kept := _cached(file, count)) is not None:
        return kept
    # around the whole of it: autocast forgets its copies of the weights when its outermost block ends
    said = Said(count, how) if progress and not sys.stderr.isatty() else None
    with autocast(), _sampler(model, tokenizer, seed, how, said) as write, _bar(count, progress) as bar:
        rows = _rows(write, tokenizer, count, how, bar)
    if file is not None:
        try:
            store(file, rows)
        except OSError as error:  # the rows are here
            logger.warning(
                "%s cannot be written: %s. Another run writes the same rows anew, unless FTPLUS_CACHE names a better "
                "folder.",
                file,
                error.strerror or error,
            )
    return Dataset.from_list(rows)


Write = Callable[[list[str], int, str], list[str]]
"""`write(openings, tokens, stop)`: what the model writes after each opening, up to the end of its turn or `stop`."""


def _rows(write: Write, tokenizer: PreTrainedTokenizerBase, count: int, how: Sampling, bar: tqdm) -> list[Row]:
    rows: list[Row] = []
    seen: set[str] = set()
    tried, most, usable = 0, TRIES * how.batch_size * -(-count // how.batch_size), 1.0
    while tried < most:
        wanted = min(how.batch_size, math.ceil((count - len(rows)) / usable) + SPARE)
        found = _batch(write, tokenizer, wanted, how, seen)
        tried, usable = tried + wanted, max(len(found), 0.5) / wanted  # of this batch: what is new may become rare
        bar.update(len(found[: count - len(rows)]))
        rows += found[: count - len(rows)]
        if len(rows) == count:
            return rows
    raise DataError(
        f"The model wrote only {len(rows)} usable rows of {count} in {tried} tries; the others were empty or repeated. "
        "Ask for fewer (self:N), or protect with a file of your own: --protect FILE."
    )


def _batch(write: Write, tokenizer: PreTrainedTokenizerBase, size: int, how: Sampling, seen: set[str]) -> list[Row]:
    if not tokenizer.chat_template:
        texts = _fresh(write([_first_token(tokenizer)] * size, how.request_tokens + how.max_new_tokens, ""), seen)
        return [{"text": text} for text in texts]
    header, stop = open_user_turn(tokenizer)
    requests = _fresh(write([header] * size, how.request_tokens, stop), seen)
    chats = [[{"role": "user", "content": request}] for request in requests]
    openings = [rendered(chat, tokenizer, tokenize=False, add_generation_prompt=True) for chat in chats]
    answers = write(openings, how.max_new_tokens, "") if openings else []
    return [
        {"prompt": chat, "completion": [{"role": "assistant", "content": answer}]}
        for chat, answer in zip(chats, answers, strict=True)
        if _says_something(answer)
    ]


def open_user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template up to where the user's words begin, and what it writes right after them."""
    whole = rendered([{"role": "user", "content": USER}], tokenizer, tokenize=False)
    header, found, after = whole.partition(USER)
    if not found:
        raise DataError(
            f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} does not show the user's words, so it "
            "cannot be opened at the user's turn. Protect with a file instead: --protect FILE."
        )
    return header, after.strip()


def _first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    token = tokenizer.bos_token or tokenizer.eos_token
    if not token:
        raise DataError(
            "The tokenizer has neither a chat template nor a first or last token, so the model has nothing to start "
            "writing from. Protect with a file instead: --protect FILE."
        )
    return token


def _fresh(texts: list[str], seen: set[str]) -> list[str]:
    """Texts that say something not said before."""
    fresh = []
    for text in texts:
        if _says_something(text) and text not in seen:
            seen.add(text)
            fresh.append(text)
    return fresh


def _says_something(text: str) -> bool:
    """False for nothing, for signs alone, and for a loop: ten words or more of which hardly any differ."""
    words = text.split()
    return any(c.isalnum() for c in text) and (len(words) < 10 or len(set(words)) > len(words) / 5)


class Said(LogitsProcessor):
    """Says once, after the first few tokens, how long the rest will take; for where no bar is shown."""

    def __init__(self, count: int, how: Sampling) -> None:
        self.count, self.drawn, self.begin = count, 0, 0.0
        self.tokens = -(-count // how.batch_size) * (how.request_tokens + how.max_new_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.drawn += 1
        if self.drawn == 1:  # the opening has been read, and kernels are warm
            self.begin = time.perf_counter()
        if self.drawn == 1 + AFTER:
            seconds = (time.perf_counter() - self.begin) / AFTER * self.tokens
            logger.info("writing %d rows with the starting model, about %.0f s", self.count, max(seconds, 1))
        return scores


class Nucleus(LogitsProcessor):
    """Draw each next token from the likeliest ones that together hold `top_p` (Holtzman 2020); the rest is ruled out.

    The same distribution as transformers' temperature and top_p, which sort the whole vocabulary. `together`, all ranks
    write what the first one draws: those of a sharded model run as many forward passes, or wait for ever.
    """

    def __init__(self, temperature: float, top_p: float, together: bool = False) -> None:
        self.temperature, self.top_p, self.together = temperature, top_p, together

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T], [B, V] -> [B, V]: 0 at the token drawn, -inf elsewhere."""
        probs = (scores.float() / self.temperature).softmax(-1)
        if self.top_p == 1:
            drawn = torch.multinomial(probs, 1)
        else:
            likely, tokens = probs.topk(min(CANDIDATES, probs.shape[-1]))
            drawn, flat = self._draw(likely, tokens), likely.sum(-1) < self.top_p
            if flat.any():
                drawn[flat] = self._draw(*probs[flat].sort(-1, descending=True))
        if self.together:
            torch.distributed.broadcast(drawn, 0)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)

    def _draw(self, likely: Tensor, tokens: Tensor) -> Tensor:
        summed = likely.cpu() if torch.are_deterministic_algorithms_enabled() else likely  # CUDA has no such cumsum
        before = summed.cumsum(-1).to(likely.device) - likely
        nucleus = torch.where(before < self.top_p, likely, 0.0)
        return tokens.gather(-1, torch.multinomial(nucleus, 1))


@contextmanager
def _sampler(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int, how: Sampling, said: Said | None = None
) -> Iterator[Write]:
    writer = model.get_base_model() if is_peft_model(model) else model
    stops = stop_ids(model, tokenizer)
    settings, together, room = writer.generation_config, sharded(model.parameters()), positions(model)

    def write(openings: list[str], tokens: int, stop: str) -> list[str]:
        last = stops | _first_special(tokenizer, stop)
        ids, mask = left_padded(
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in openings], tokenizer
        )
        if ids.shape[1] >= room:
            raise DataError(
                f"The model reads {room} tokens, and what it is to answer has {ids.shape[1]} already. Protect with a "
                "file instead: --protect FILE."
            )
        # Every setting that a checkpoint's own generation_config could bring in (top_k, penalties) is off.
        writer.generation_config = GenerationConfig(
            do_sample=False,  # `Nucleus` draws
            num_beams=1,
            max_new_tokens=min(tokens, room - ids.shape[1]),
            eos_token_id=sorted(last),
            pad_token_id=pad_id(tokenizer),
            use_cache=True,
        )
        device = next(model.parameters()).device
        draw = LogitsProcessorList([*([said] if said else []), Nucleus(how.temperature, how.top_p, together)])
        out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), logits_processor=draw)
        return [_text(row, tokenizer, last, stop) for row in out[:, ids.shape[1] :].tolist()]

    try:
        with evaluating(model), private_rng(next(model.parameters()).device, seed):
            yield write
    finally:
        writer.generation_config = settings
        reshard(model)


@contextmanager
def private_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators of CPU and `device` for a while; what they would have drawn next, they draw next after."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device of the machine
        if device.type == "cpu":
            yield
            return
        module = torch.get_device_module(device)
        chosen = module.device(device) if hasattr(module, "device") else nullcontext()  # Apple's GPU is the only one
        with chosen:  # torch.accelerator.device_index is of torch 2.8
            state = module.get_rng_state()
            module.manual_seed(seed)
            try:
                yield
            finally:
                module.set_rng_state(state)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a turn: what tokenizer and checkpoint call end of sequence."""
    ends = causal_lm(model).generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in [tokenizer.eos_token_id, *ends] if token is not None}


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> set[int]:
    """The special token that `text` begins with, if it does: the end of the user's turn in most templates."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return {ids[0]} & (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) if ids else set()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id; any id serves, since pads are masked and unsupervised."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else 0


def left_padded(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids of prompts side by side, and the mask of what is no padding; both [rows, longest]."""
    width, pad = max(1, *map(len, rows)), pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int], stop: str) -> str:
    """The words up to the end of the turn. A turn that ran out of tokens ends with its last whole sentence."""
    special = stops | set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(ids) if token in special), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    if stop and stop in text:  # templates that end the user's turn with plain text, such as " [/INST]"
        return text.partition(stop)[0].strip()
    return text.strip() if end is not None else _whole_sentences(text).strip()


def _whole_sentences(text: str) -> str:
    """Without the sentence that was cut off; everything when there is no other."""
    ends = [i + 1 for i, c in enumerate(text) if c == "\n" or (c in ".!?" and text[i + 1 : i + 2].isspace())]
    return text[: ends[-1]] if ends and text[: ends[-1]].strip() else text


def _bar(count: int, progress: bool) -> tqdm:
    return tqdm(total=count, desc="self-generated text", unit="row", disable=None if progress else True)


# ---- the cache -----------------------------------------------------------------------------------------------------


def _key(model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, how: Sampling) -> str:
    device = next(model.parameters()).device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as loaded"
    known = [fingerprint(model), architecture(model), tokenizer_fingerprint(tokenizer)]
    parts = [FORMAT, *known, count, seed, asdict(how), precision]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _cached(file: Path, count: int) -> Dataset | None:
    """Rows of an earlier run; None when there are none, or when the file was damaged since."""
    try:
        rows = load(str(file)) if file.is_file() else None
    except DataError:
        return None
    return rows if rows is not None and len(rows) == count else None


def store(file: Path, rows: list[Row]) -> None:
    """Rows as JSON lines, for their owner alone: a model may say what it was trained on."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write(file, "".join(lines), private=True)
