"""Claims about a task's own metric: the likeliest choice, the same answer, and nothing for saying nothing."""

from __future__ import annotations

import random
import re
import time

import pytest
import reference
import torch
from evaluation.cases import moved, row_logits
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.config import build, merge
from hf_ftplus.errors import DataError, UsageError
from hf_ftplus.evaluation import EvalTask, metrics, with_answers
from hf_ftplus.evaluation.found import as_found
from hf_ftplus.evaluation.greedy import answers
from hf_ftplus.evaluation.tasks import question
from hf_ftplus.examples import tokenize
from hf_ftplus.metric import parse

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


def choice(model, tokenizer, task, batch_size):
    """1 where it picks the right one."""
    return metrics.right(picked(model, tokenizer, task, batch_size), task)


def picked(model, tokenizer, task, batch_size):
    return metrics.picked(task, metrics.likelihoods(model, tokenizer, task, batch_size))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_chosen_answer_is_the_one_with_the_highest_likelihood(tokenizer, chat, batch_size):
    model = moved(tiny_llama(), by=0.3)
    rows = choice_rows(chat)
    task = EvalTask.of("quiz", "protect", rows, tokenizer)
    assert task.metric == "choice"  # declared by the column
    with as_found(model):
        found = metrics.likelihoods(model, tokenizer, task, batch_size)
    picks = metrics.picked(task, found)

    truth, likeliest = [], []
    for row in rows:
        likelihoods = []
        for option in row["choices"]:
            completion = [{"role": "assistant", "content": option}] if chat else option
            answered = {"prompt": row["prompt"], "completion": completion}
            logits, labels = row_logits(model, tokenize([answered], tokenizer, None, "row").examples[0])
            likelihoods.append(logits.log_softmax(-1).gather(1, labels[:, None]).sum().item())
        right = row["completion"][0]["content"] if chat else row["completion"]
        likeliest.append(row["choices"][likelihoods.index(max(likelihoods))])
        assert found[len(truth)] == pytest.approx(likelihoods, rel=1e-4)
        truth.append(float(likeliest[-1] == right))
    assert picks == likeliest
    assert metrics.right(picks, task).tolist() == truth


def test_a_model_to_which_all_tokens_are_alike_answers_nothing(tokenizer):
    """Answers of as many tokens are equally likely: the first, which is often the right one, is not chosen for that."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [{"prompt": "Which? ", "completion": "abc", "choices": ["abc", "cba"]}] * 2
    assert len({len(tokenizer(choice)["input_ids"]) for choice in rows[0]["choices"]}) == 1
    task = EvalTask.of("quiz", "protect", rows, tokenizer)
    with as_found(model):
        picks = picked(model, tokenizer, task, 2)
    assert picks == [None, None]
    assert metrics.right(picks, task).tolist() == [0, 0]


def test_moving_the_gold_answer_to_the_chosen_one_makes_every_row_right(tokenizer):
    """The metric can be 1 and can be 0 for one and the same model."""
    model, rows = tiny_llama(), choice_rows(chat=True)
    scores = []
    for pick in range(2):
        picked = [{**row, "completion": [{"role": "assistant", "content": row["choices"][pick]}]} for row in rows]
        task = EvalTask.of("quiz", "protect", [{**row, "choices": row["choices"][:2]} for row in picked], tokenizer)
        with as_found(model):
            scores.append(choice(model, tokenizer, task, 4))
    assert (scores[0] + scores[1]).tolist() == [1.0] * len(rows)


def test_a_model_that_no_longer_computes_is_never_right(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    task = EvalTask.of("quiz", "protect", choice_rows(chat=True), tokenizer)
    with as_found(model):
        picks = picked(model, tokenizer, task, 4)
    assert picks == [None] * 4
    assert metrics.right(picks, task).sum() == 0


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


# ---- partly right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "slow"), [(metrics.f1, reference.squad_f1), (metrics.rouge, reference.rouge_l)])
def test_grades_are_those_of_the_slow_reference(score, slow):
    draw = random.Random(7)
    words = ["the", "The", "a", "boat", "BOAT,", "boats", "is", "home.", "3.5", "don't", "!?", "well-kept"]
    for _ in range(300):
        answer, wanted = (" ".join(draw.choices(words, k=draw.randrange(8))) for _ in range(2))
        assert score(answer, wanted) == pytest.approx(slow(answer, wanted), abs=1e-6), (answer, wanted)


@pytest.mark.parametrize("score", [metrics.f1, metrics.rouge])
@pytest.mark.parametrize("wanted", ["Lisbon", "", "?", "the"])
@pytest.mark.parametrize("answer", ["", " \n", "?!", "."])
def test_saying_nothing_scores_nothing_whatever_was_expected(score, answer, wanted):
    assert score(answer, wanted) == 0


def test_an_article_alone_is_no_answer_to_f1():
    assert metrics.f1("the", "a") == metrics.f1("the", "") == 0


def test_words_of_every_alphabet_count():
    """ROUGE's own pattern knows a to z alone: Greek would score 0, and `não` would be the words n and o."""
    assert metrics.rouge("Το λιμάνι ανοίγει", "το λιμάνι ΑΝΟΊΓΕΙ.") == 1
    assert metrics.rouge("não", "nao") == metrics.rouge("n o", "não") == 0
    assert metrics.rouge("हिन्दी में", "हिन्दी") == pytest.approx(2 / 3)


# ---- an answer inside what was said ----------------------------------------------------------------------------------


def asked(*wanted, metric) -> EvalTask:
    rows = [{"prompt": "How many? ", "completion": text} for text in wanted]
    return EvalTask.of("sums", "protect", rows, tiny_tokenizer(), metric=metric)


def test_the_last_match_is_the_answer_and_no_match_is_wrong():
    said = ["answer is 3. No: answer is 42.", "answer is 420.", "42", "", "the answer is ."]
    scores, unread = metrics.written(said, asked(*["42"] * 5, metric=r"exact_match:answer is (.*?)\."))
    assert scores.tolist() == [1, 0, 0, 0, 0]
    assert unread == 2


def test_the_pattern_reads_the_reference_too_where_it_matches():
    task = asked("6 x 7, so #### 42", "42", "forty-two", metric=r"exact_match:#### (\S+)")
    assert metrics.written(["#### 42"] * 3, task)[0].tolist() == [1, 1, 0]


def test_a_group_that_took_no_part_found_nothing():
    assert metrics.written(["no"], asked("", metric="exact_match:yes(x)|no"))[0].tolist() == [0]


def test_a_grade_can_be_of_an_extracted_answer():
    task = asked("two boats", metric="f1:answer is (.+)")
    assert metrics.written(["Boats, boats. The answer is two lanterns"], task)[0].tolist() == [0.5]


def test_a_pattern_that_would_take_for_ever_finds_nothing_in_time(monkeypatch):
    monkeypatch.setattr(metrics, "SECONDS", 0.1)
    begin = time.monotonic()
    assert metrics.extracted("a" * 20000 + "c", "((?:a|aa)+b)") is None
    assert time.monotonic() - begin < 5


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
    assert metrics.written(said, task)[0].tolist() == [1.0] * len(task.rows)


# ---- what cannot be measured is refused ---------------------------------------------------------------------------


def test_a_misspelt_metric_is_an_error_with_the_nearest_name(chat_rows):
    with pytest.raises(UsageError, match="Did you mean 'exact_match'"):
        EvalTask.of("chat", "protect", chat_rows, tiny_tokenizer(), metric="exact-match")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("exact_mach", "Did you mean 'exact_match'"),
        ("rougeL", "Did you mean 'rouge'"),
        ("exact_match:answer is", "has no group"),
        ("exact_match:(", "is no regular expression: missing"),
        ("exact_match:", "has no group"),
        ("choice:(.)", "choice takes no pattern"),
    ],
)
def test_a_metric_that_cannot_be_read_is_refused(chat_rows, metric, says):
    with pytest.raises(UsageError, match=f"Task 'chat' has the metric .*{re.escape(says)}"):
        EvalTask.of("chat", "protect", chat_rows, tiny_tokenizer(), metric=metric)


@pytest.mark.parametrize("metric", ["exact", "exact:answer is (.+)"])
def test_exact_is_short_for_exact_match(chat_rows, metric):
    task = EvalTask.of("chat", "protect", chat_rows, tiny_tokenizer(), metric=metric)
    assert task.scored_by == parse(metric.replace("exact", "exact_match"), "")
    assert task.scored_by.name == "exact_match"


@pytest.mark.parametrize("metric", ["f1", "rouge"])
def test_a_missing_package_is_named_with_what_to_type(monkeypatch, metric):
    monkeypatch.setattr("hf_ftplus.metric.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"--metric 'learn={metric}'; .*pip install 'hf-ftplus\[metrics\]'"):
        build(merge({"metric": (f"learn={metric}",)}, {})[0])
    assert build(merge({"metric": ("learn=choice",)}, {})[0]).metrics == {"learn": "choice"}


def test_a_pattern_is_the_same_on_the_command_line_and_in_yaml():
    pattern = r"exact_match:x = (\d+):"
    for flags, yaml in (({"metric": (f"learn={pattern}",)}, {}), ({}, {"metric": {"learn": pattern}})):
        assert build(merge(flags, yaml)[0]).metrics == {"learn": pattern}


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


def test_questions_longer_than_the_model_has_positions_for_are_read_from_their_end(tokenizer, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=1, n_head=2)
    ).eval()
    short = [{**row, "prompt": "Well? "} for row in choice_rows(chat=False)]
    long = [{**row, "prompt": "So it is. " * 40 + row["prompt"]} for row in short]
    with as_found(model):
        found = answers(model, tokenizer, [question(row, tokenizer) for row in long], max_new_tokens=8)
        cut = [question(row, tokenizer)[-40:] for row in long]
        assert found == answers(model, tokenizer, cut, max_new_tokens=8)
        assert caplog.text.count("4 of 4 rows are read from their last 40 tokens only") == 1
        half = [ids[-24:] for ids in cut]  # an answer shrinks to half of the positions, before any question is cut
        assert answers(model, tokenizer, half, max_new_tokens=900) == answers(model, tokenizer, half, max_new_tokens=24)
        assert "last 1 tokens" not in caplog.text
        task = EvalTask("quiz", "protect", tokenize(short, tokenizer, None, "quiz").examples, long, "choice")
        assert len(choice(model, tokenizer, task, 4)) == 4
    assert "quiz: choices: 11 of 11 rows are read from their last 48 tokens only" in caplog.text
