"""Read what a model answers, batch by batch, taking the likeliest token at every step."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..formats import Row
from ..generate import left_padded, pad_id, stop_ids
from ..logits import bare, causal_lm, positions
from ..weights import sharded
from .found import as_found, device_of, warn_of_cut
from .scoring import Autocast
from .tasks import answered, question


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[list[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    autocast: Autocast = nullcontext,
    label: str = "answer",
) -> list[str]:
    """The answer to each question (token ids), up to the end of the turn; greedy at temperature 0.

    Where question and answer are too long for the model's positions together, the answer becomes shorter, but not below
    half of them; then a question loses its beginning. Belongs inside `as_found`.
    """
    places, longest = positions(model), max(map(len, questions), default=0)
    max_new_tokens = min(max_new_tokens, max(places // 2, places - longest))
    room = max(1, places - max_new_tokens)
    warn_of_cut(list(map(len, questions)), room, label)
    questions = [ids[-room:] for ids in questions]
    inner, stops = causal_lm(model), stop_ids(model, tokenizer)
    # Set on the model as well: what is left unset (penalties, beams) would come from the checkpoint's own settings.
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    settings = inner.generation_config = GenerationConfig(
        **{"do_sample": False, **drawn},
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad_id(tokenizer),
        use_cache=True,
    )
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    with tqdm(total=len(questions), desc=label, unit="row", disable=None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            asked, mask = (part.to(device_of(model)) for part in left_padded([questions[i] for i in group], tokenizer))
            with autocast():
                out = bare(model).generate(
                    input_ids=asked,
                    attention_mask=mask,
                    generation_config=settings,
                    synced_gpus=sharded(model.parameters()) or None,  # None: as the library finds right
                )
            for i, ids in zip(group, out[:, asked.shape[1] :].tolist(), strict=True):
                end = next((k for k, token in enumerate(ids) if token in stops), None)
                texts[i] = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
            bar.update(len(group))
    return texts


def with_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 48,
    autocast: Autocast = nullcontext,
) -> list[Row]:
    """Rows completed by what `model` itself answers now: a reference for questions that have no right answer.

    A question that it answers with nothing is left out.
    """
    with as_found(model):
        found = answers(
            model,
            tokenizer,
            [question(row, tokenizer) for row in rows],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            autocast=autocast,
            label="reference answers",
        )
    return [answered(row, answer) for row, answer in zip(rows, found, strict=True) if answer]
