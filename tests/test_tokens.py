"""Rows become the tokens and labels of TRL, and batches of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.batches import by_length
from hf_ftplus.data import normalise
from hf_ftplus.errors import DataError, IncompatibleError
from hf_ftplus.examples import collate, tokenize


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- the same tokens as TRL ----------------------------------------------------------------------------------------


def trl_examples(rows: Dataset, tokenizer, max_length: int | None, tmp_path: Path, **config) -> list[dict]:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path / "out"), max_length=max_length, report_to=[], use_cpu=True, bf16=False, **config
    )
    trainer = SFTTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)
    return [{key: list(row[key]) for key in ("input_ids", "labels")} for row in trainer.train_dataset]


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_bare_tokens_are_labelled_as_trl_labels_them(masked, tmp_path):
    rows = [
        {"input_ids": list(range(5, 5 + n))} | ({"assistant_masks": [0] * 2 + [1] * (n - 2)} if masked else {})
        for n in (3, 5)
    ]
    ours = tokenize(normalise(rows, "rows"), tiny_tokenizer(), 4, "rows").examples
    assert ours == trl_examples(Dataset.from_list(rows), tiny_tokenizer(), 4, tmp_path)


def strings(rows: list[dict]) -> list[dict]:
    return [{key: row[key][0]["content"] for key in row} for row in rows]


def texts(rows: list[dict]) -> list[dict]:
    return [{"text": row["prompt"] + " " + row["completion"]} for row in strings(rows)]


@pytest.mark.parametrize("max_length", [None, 512, 24])
@pytest.mark.parametrize("style", [list, strings, texts], ids=["chat", "strings", "text"])
def test_tokens_and_labels_are_those_of_trl(style, max_length, chat_rows, tmp_path):
    rows = Dataset.from_list(style(chat_rows))
    ours = tokenize(rows, tiny_tokenizer(), max_length, "chats")
    assert ours.examples == trl_examples(rows, tiny_tokenizer(), max_length, tmp_path)
    assert ours.rows == len(chat_rows)
    assert ours.dropped == len(chat_rows) - len(ours.examples)
    assert (ours.dropped > 0) == (max_length == 24 and style is not texts)


def test_tokens_are_those_of_trl_where_the_prompt_ends_inside_a_token(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": "Name a fr", "completion": "uit. Pear."}, {"prompt": "The", "completion": " <|im_end|>"}]
    )
    ours = tokenize(rows, tiny_tokenizer(), 64, "merged").examples
    assert ours == trl_examples(rows, tiny_tokenizer(), 64, tmp_path)
    prompt = tiny_tokenizer()("Name a fr")["input_ids"]
    assert sum(label == -100 for label in ours[0]["labels"]) < len(prompt), "the boundary was to fall inside a token"


def test_tokens_are_those_of_trl_with_a_template_that_takes_arguments(tmp_path):
    template = "{% if style is defined %}[{{ style }}]{% endif %}" + tiny_tokenizer().chat_template
    row = {"prompt": chat("Why?", "")[:1], "completion": chat("", "Hm.")[1:], "chat_template_kwargs": {"style": "dry"}}
    rows = normalise([row], "styled")
    ours = tokenize(rows, tiny_tokenizer(template), 64, "styled").examples
    assert ours == trl_examples(rows, tiny_tokenizer(template), 64, tmp_path)
    assert "[dry]" in tiny_tokenizer().decode(ours[0]["input_ids"])


@pytest.mark.fault("E11")
def test_every_assistant_turn_of_messages_is_supervised_and_nothing_else(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *chat("Why?", "Hm."), *chat("Who?", "Odile.")]
    example = tokenize([{"messages": messages}], tokenizer, None, "two turns").examples[0]
    assert example["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    supervised = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert tokenizer.decode(supervised) == "Hm.<|im_end|>\nOdile.<|im_end|>\n"
    assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))


def test_messages_with_one_answer_equal_prompt_and_completion(chat_rows, tokenizer):
    whole = [{"messages": row["prompt"] + row["completion"]} for row in chat_rows]
    assert tokenize(whole, tokenizer, None, "a").examples == tokenize(chat_rows, tokenizer, None, "b").examples


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and not loop.last %}(short)"
        "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": chat("Why?", "Hm.") + chat("Who?", "Odile.")}]
    with pytest.raises(IncompatibleError, match=r"two turns, row 1: the chat template of tiny .*prompt \+ completion"):
        tokenize(rows, tiny_tokenizer(rewriting), None, "two turns")


def test_a_template_that_refuses_a_chat_is_quoted_with_the_row():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}hello"
    rows = [{"prompt": [{"role": "system", "content": "x"}], "completion": chat("", "y")[1:]}]
    with pytest.raises(DataError, match=r"odd, row 1: the chat template of tiny refuses this chat .*user first"):
        tokenize(rows, tiny_tokenizer(strict), None, "odd")


@pytest.mark.fault("E7")
def test_chat_without_chat_template_names_tokenizer_and_option(chat_rows):
    with pytest.raises(DataError, match=r"chats, row 1 is a chat, and the tokenizer of tiny .*--chat_template_path"):
        tokenize(chat_rows, tiny_tokenizer(chat_template=None), 64, "chats")


@pytest.mark.fault("E8", "E9")
def test_no_supervised_token_left_names_task_and_counts(chat_rows, tokenizer):
    with pytest.raises(
        DataError, match=r"chats: no supervised token is left in 26 rows \(26 dropped\) at max_length=3; the longest"
    ):
        tokenize(chat_rows, tokenizer, 3, "chats")


@pytest.mark.fault("E8", "E10")
def test_rows_that_are_left_out_are_counted_by_reason_with_the_first_numbers(tokenizer):
    good, none = {"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6], "labels": [-100, -100]}
    cut = {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]}
    done = tokenize([good, cut, none, *[cut] * 5, good], tokenizer, 4, "ids")
    assert done.dropped == 7
    assert (
        done.why()
        == "6 are cut before what is supervised (rows 2, 4, 5, 6, 7, ...); 1 have nothing supervised (rows 3)"
    )


def test_one_lonely_token_is_not_supervision(tokenizer):
    """The first token of a sequence is never predicted."""
    with pytest.raises(DataError, match="no supervised token"):
        tokenize([{"text": "home"}], tokenizer, 1, "words")


def test_kept_rows_stay_in_step_with_their_examples(chat_rows, tokenizer):
    done = tokenize(chat_rows, tokenizer, 24, "chats")
    for index, example in zip(done.kept, done.examples, strict=True):
        question = chat_rows[index]["prompt"][0]["content"]
        assert question in tokenizer.decode(example["input_ids"])


@pytest.mark.fault("E12")
def test_tokenized_rows_pass_and_foreign_ids_are_refused(tokenizer):
    good = normalise([{"input_ids": [5, 6], "labels": [-100, 6]}], "ids")
    assert tokenize(good, tokenizer, None, "ids").examples == [{"input_ids": [5, 6], "labels": [-100, 6]}]
    for bad in ({"input_ids": [5, 999], "labels": [5, 6]}, {"input_ids": [5, 6], "labels": [5, -1]}):
        with pytest.raises(DataError, match=r"ids, row 1: .* the vocabulary of tiny has 384 tokens"):
            tokenize(normalise([bad], "ids"), tokenizer, None, "ids")


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collate_pads_right_and_supervises_no_padding():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [9, 9], "labels": [9, 9]},
    ]
    first, second = collate(examples, pad_token_id=0, batch_size=2)
    assert first["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert first["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert second["input_ids"].tolist() == [[9, 9, 0]], "nothing is wider than the longest example"
    assert all(tensor.dtype == torch.long for tensor in first.values())


def test_micro_batches_have_few_widths():
    examples = [{"input_ids": [1] * length, "labels": [1] * length} for length in range(1, 41)]
    widths = [batch["input_ids"].shape[1] for batch in collate(examples, pad_token_id=0, batch_size=1)]
    assert widths == [16] * 16 + [32] * 16 + [40] * 8


def test_the_first_protect_rows_are_a_fair_sample_of_all_and_share_micro_batches_with_their_like():
    rows = [{"input_ids": [0] * (10 + i), "labels": [0] * (10 + i)} for i in range(64)]
    found = by_length(rows)
    assert sorted(found, key=lambda row: len(row["input_ids"])) == rows
    lengths = [len(row["input_ids"]) for row in found]
    assert abs(sum(lengths[:32]) / 32 - 41.5) < 4  # in order it would be 25.5
    assert all(max(lengths[i : i + 4]) - min(lengths[i : i + 4]) == 3 for i in range(0, 64, 4))
    assert by_length(rows[:6])[-2:] == rows[4:6]  # a short group stays last, or all after it would be out of step


def test_padding_does_not_change_the_loss(chat_rows, tokenizer, model):
    examples = tokenize(chat_rows, tokenizer, None, "chats").examples[:6]

    def total(size: int) -> float:
        with torch.no_grad():
            return sum(
                float(model(**batch).loss) * int((batch["labels"][:, 1:] != -100).sum())
                for batch in collate(examples, 0, size)
            )

    assert total(6) == pytest.approx(total(1), rel=1e-5)
