"""Claims about a task's own metric: the likeliest choice, the same answer, and nothing for saying nothing."""

from __future__ import annotations

import pytest
import torch
from evaluation.cases import moved, row_logits
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.errors import DataError, UsageError
from hf_ftplus.evaluation import EvalTask, metrics, with_answers
from hf_ftplus.evaluation.found import as_found
from hf_ftplus.evaluation.greedy import answers
from hf_ftplus.evaluation.tasks import question
from hf_ftplus.examples import tokenize

CHOICES = [
    ("Is seven even?", ["yes", "no, not at all, it is odd"], "yes"),
    ("Name a fruit.", ["Pear.", "Pear. And then a longer one.", "A boat."], "A boat."),
    ("Count.", ["one", "one two", "one two three four", "five"], "five"),
    ("The harbour?", ["open", "closed"], "open"),
]


def choice_rows(chat: bool) -> list[dict]:
    if not chat:
        return [{"prompt": q + " ", "completion": right, "choices": options} for q, options, right in CHOICES]
    return [
        {
            "prompt": [{"role": "user", "content": q}],
            "completion": [{"role": "assistant", "content": right}],
            "choices": options,
        }
        for q, options, right in CHOICES
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_chosen_answer_is_the_one_with_the_highest_likelihood(tokenizer, chat, batch_size):
    model = moved(tiny_llama(), by=0.3)
    rows = choice_rows(chat)
    task = EvalTask.of("quiz", "protect", rows, tokenizer)
    assert task.metric == "choice"  # declared by the column
    with as_found(model):
        found = metrics.choice(model, tokenizer, task, batch_size)

    truth = []
    for row in rows:
        likelihoods = []
        for option in row["choices"]:
            completion = [{"role": "assistant", "content": option}] if chat else option
            answered = {"prompt": row["prompt"], "completion": completion}
            logits, labels = row_logits(model, tokenize([answered], tokenizer, None, "row").examples[0])
            likelihoods.append(logits.log_softmax(-1).gather(1, labels[:, None]).sum().item())
        right = row["completion"][0]["content"] if chat else row["completion"]
        truth.append(float(row["choices"][likelihoods.index(max(likelihoods))] == right))
    assert found.tolist() == truth


def test_moving_the_gold_answer_to_the_chosen_one_makes_every_row_right(tokenizer):
    """The metric can be 1 and can be 0 for one and the same model."""
    model, rows = tiny_llama(), choice_rows(chat=True)
    scores = []
    for pick in range(2):
        picked = [{**row, "completion": [{"role": "assistant", "content": row["choices"][pick]}]} for row in rows]
        task = EvalTask.of("quiz", "protect", [{**row, "choices": row["choices"][:2]} for row in picked], tokenizer)
        with as_found(model):
            scores.append(metrics.choice(model, tokenizer, task, 4))
    assert (scores[0] + scores[1]).tolist() == [1.0] * len(rows)


def test_a_model_that_no_longer_computes_is_never_right(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    task = EvalTask.of("quiz", "protect", choice_rows(chat=True), tokenizer)
    with as_found(model):
        assert metrics.choice(model, tokenizer, task, 4).sum() == 0


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Lisbon.", "lisbon"),
        ("  LISBON \n by   the sea!", "Lisbon by the sea"),
        ("Stra\u00dfe", "STRASSE"),
        ("cafe\u0301", "caf\u00e9"),
        ("Yes?!...", "yes"),
    ],
)
def test_spelling_of_the_same_answer_does_not_matter(answer, wanted):
    assert metrics.matches(answer, wanted)


@pytest.mark.parametrize("wanted", ["Lisbon", "", ".", "   "])
@pytest.mark.parametrize("answer", ["", "  \n", ".", "?!"])
def test_an_empty_answer_is_never_right(answer, wanted):
    assert not metrics.matches(answer, wanted)


def test_a_part_of_the_answer_is_not_the_answer():
    assert not metrics.matches("Lis", "Lisbon")
    assert not metrics.matches("Lisbon, or Porto", "Lisbon")
    assert not metrics.matches("3.5", "35")


# ---- what the model says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 26])
def test_answers_are_those_of_each_question_alone_whatever_its_padding(chat_rows, tokenizer, batch_size):
    model = moved(tiny_llama(), by=0.3)
    questions = [question(row, tokenizer) for row in chat_rows]
    with as_found(model):
        found = answers(model, tokenizer, questions, batch_size=batch_size, max_new_tokens=6)
    for ids, answer in zip(questions, found, strict=True):
        said = list(ids)
        for _ in range(6):
            with torch.no_grad():
                said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
            if said[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(said[len(ids) :], skip_special_tokens=True).strip()


def test_a_checkpoints_own_sampling_settings_do_not_reach_the_answers(chat_rows, tokenizer):
    model = moved(tiny_llama(), by=0.3)
    questions = [question(row, tokenizer) for row in chat_rows[:6]]

    def said():
        with as_found(model):
            return answers(model, tokenizer, questions, max_new_tokens=6)

    plain = said()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    assert said() == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_a_question_is_the_template_opened_at_the_answer(tokenizer):
    row = {"prompt": [{"role": "user", "content": "Why?"}], "completion": [{"role": "assistant", "content": "So."}]}
    assert tokenizer.decode(question(row, tokenizer)) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    chat = {"messages": [*row["prompt"], *row["completion"], {"role": "user", "content": "And?"}, *row["completion"]]}
    assert tokenizer.decode(question(chat, tokenizer)).endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    example = tokenize([row], tokenizer, None, "row").examples[0]
    assert question(example, tokenizer) == question(row, tokenizer)


def test_the_model_can_write_the_reference_for_questions_without_one(tokenizer):
    model = moved(tiny_llama(), by=0.3)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Why?", "Name a colour.")]
    done = with_answers(model, tokenizer, rows, max_new_tokens=5)
    assert done
    task = EvalTask.of("chat", "protect", done, tokenizer, metric="exact_match")
    with as_found(model):
        said = answers(model, tokenizer, [question(row, tokenizer) for row in task.rows], max_new_tokens=5)
    assert metrics.exact_match(said, task).tolist() == [1.0] * len(task.rows)


# ---- what cannot be measured is refused ---------------------------------------------------------------------------


def test_a_misspelt_metric_is_an_error_with_the_nearest_name(chat_rows):
    with pytest.raises(UsageError, match="Did you mean 'exact_match'"):
        EvalTask.of("chat", "protect", chat_rows, tiny_tokenizer(), metric="exact-match")


def test_an_unknown_role_is_an_error(chat_rows):
    with pytest.raises(UsageError, match="expected one of learn, protect, measure"):
        EvalTask.of("chat", "keep", chat_rows, tiny_tokenizer())


def test_choice_needs_the_completion_among_the_choices(tokenizer):
    row = {**choice_rows(chat=True)[0], "choices": ["maybe", "never"]}
    with pytest.raises(DataError, match="row 1 has a completion that is not one of its 'choices'"):
        EvalTask.of("quiz", "protect", [row], tokenizer)


def test_a_metric_needs_a_question(tokenizer):
    with pytest.raises(DataError, match="no question to ask"):
        EvalTask.of("text", "protect", [{"text": "The harbour opens at six."}], tokenizer, metric="exact_match")


def test_rows_that_truncation_emptied_leave_the_task(chat_rows, tokenizer):
    long = {"prompt": [{"role": "user", "content": "why " * 200}], "completion": chat_rows[0]["completion"]}
    task = EvalTask.of("chat", "protect", [long, *chat_rows[:2]], tokenizer, max_length=64)
    assert task.rows == chat_rows[:2]
    assert len(task.examples) == 2
