"""Claims about a whole evaluation: before, after, what changed, and a model given back as it was."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import training
import trl
from datasets import Dataset
from evaluation.cases import brute_force, brute_force_kl, moved
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from hf_ftplus.errors import IncompatibleError, UsageError
from hf_ftplus.evaluation import Estimate, EvalTask, Evaluation, Level, TaskResult, retention_gate, with_answers
from hf_ftplus.evaluation.statistics import NOT_MEASURED


@pytest.fixture
def task(chat_rows, tokenizer) -> EvalTask:
    return EvalTask.of("chat", "protect", chat_rows, tokenizer)


@pytest.fixture
def evaluation(task, tokenizer) -> Evaluation:
    return Evaluation([task], tokenizer, batch_size=5, completions=3, max_new_tokens=4)


def test_figures_are_those_of_two_models_that_were_both_kept(task, evaluation):
    model = moved(tiny_llama(), by=0.2)
    start = copy.deepcopy(model)
    evaluation.before(model)
    [found] = evaluation.after(moved(model))
    tokens = sum(row[1] for row in brute_force(start, task.examples))
    for level, kept in ((found.before, start), (found.after, model)):
        truth = brute_force(kept, task.examples)
        assert level.loss.value == pytest.approx(sum(row[0] for row in truth) / tokens, rel=1e-5)
        assert level.token_accuracy.value == pytest.approx(sum(row[2] for row in truth) / tokens)
    assert found.drift.value == pytest.approx(sum(brute_force_kl(start, model, task.examples)) / tokens, rel=1e-4)
    assert found.change.loss.value == pytest.approx(found.after.loss.value - found.before.loss.value)
    assert found.drift.low <= found.drift.value <= found.drift.high
    assert (found.rows, found.tokens) == (len(task.examples), tokens)


def test_without_training_nothing_changed_and_the_intervals_know_it(chat_rows, tokenizer):
    model = moved(tiny_llama(), by=0.2)
    rows = with_answers(model, tokenizer, chat_rows, max_new_tokens=4)  # something that the model can do
    evaluation = Evaluation([EvalTask.of("chat", "protect", rows, tokenizer)], tokenizer, max_new_tokens=4)
    evaluation.before(model)
    [found] = evaluation.after(model)
    assert found.drift == found.change.loss == found.change.token_accuracy == Estimate(0, 0, 0)
    assert found.retention == Estimate(1, 1, 1)
    assert all(item.before == item.after for item in found.completions)


def test_a_run_that_stops_half_way_reports_the_start_and_measures_nothing_else(evaluation):
    [found] = evaluation.before(tiny_llama())
    assert found.before.loss.measured
    assert {found.after.loss, found.change.loss, found.drift, found.retention, found.before.metric} == {NOT_MEASURED}
    assert [item.after for item in found.completions] == [None] * 3
    assert evaluation.results() == [found]


def test_after_alone_is_measured_and_compared_with_nothing(evaluation):
    [found] = evaluation.after(tiny_llama())
    assert found.after.loss.measured
    assert {found.before.loss, found.change.loss, found.drift, found.retention} == {NOT_MEASURED}


def test_completions_are_the_same_rows_in_every_run_and_others_with_another_seed(task, tokenizer):
    shown = [Evaluation([task], tokenizer, seed=seed).shown(task) for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]
    assert Evaluation([task], tokenizer, completions=0).shown(task) == []
    assert Evaluation([task], tokenizer, completions=99).shown(task) == list(range(len(task.rows)))


def test_the_metric_keeps_its_flips_and_defines_retention(chat_rows, tokenizer):
    model = moved(tiny_llama(), by=0.3)
    rows = with_answers(model, tokenizer, chat_rows, max_new_tokens=4)
    task = EvalTask.of("chat", "protect", rows, tokenizer, metric="exact_match")
    evaluation = Evaluation([task], tokenizer, max_new_tokens=4)
    evaluation._room = lambda task: 4  # references of four tokens, none of which had to end by itself
    evaluation.before(model)
    [found] = evaluation.after(moved(model, by=0.1))
    right = found.after.metric.value * found.rows
    assert found.before.metric.value == 1
    assert 0 < right < found.rows
    assert found.flips.negative == pytest.approx(found.rows - right)
    assert found.flips.positive == 0
    assert found.retention.value == pytest.approx(found.after.metric.value)
    assert found.retention.low <= found.retention.value <= found.retention.high


def test_a_graded_metric_has_an_interval_and_no_flips(chat_rows, tokenizer):
    """Half right is neither right nor wrong, so nothing can flip."""
    model = moved(tiny_llama(), by=0.3)
    rows = with_answers(model, tokenizer, chat_rows, max_new_tokens=4)
    task = EvalTask.of("chat", "protect", rows, tokenizer, metric="rouge")
    evaluation = Evaluation([task], tokenizer, max_new_tokens=4)
    evaluation.before(model)
    [found] = evaluation.after(moved(model, by=0.1))
    assert found.metric == "rouge"
    assert 0 < found.after.metric.value < found.before.metric.value < 1
    assert found.after.metric.low < found.after.metric.value < found.after.metric.high
    assert found.retention.value == pytest.approx(found.after.metric.value / found.before.metric.value)
    assert found.flips is None


def test_a_pattern_that_finds_no_answer_is_said_and_gets_room_for_one(chat_rows, tokenizer):
    task = EvalTask.of("chat", "protect", chat_rows[:3], tokenizer, metric="exact_match:answer is (.+)")
    evaluation = Evaluation([task], tokenizer, max_new_tokens=4)
    assert evaluation._room(task) >= 256
    evaluation._room = lambda task: 4
    [found] = evaluation.before(tiny_llama())
    assert found.metric == "exact_match"
    assert "No answer was found in 3 of 3 texts before training; these score 0." in found.notes


def test_a_grade_sees_an_answer_run_on(chat_rows, tokenizer):
    graded, exact = (
        EvalTask.of("chat", "protect", chat_rows, tokenizer, metric=name) for name in ("f1", "exact_match")
    )
    evaluation = Evaluation([graded], tokenizer, max_new_tokens=4)
    assert evaluation._room(graded) > 1.7 * evaluation._room(exact)


def test_an_answer_longer_than_the_limit_can_still_match(chat_rows, tokenizer):
    """Otherwise exact match would be 0 before and after, and nobody would know why."""
    task = EvalTask.of("chat", "protect", chat_rows, tokenizer, metric="exact_match")
    longest = max(len(tokenizer(row["completion"][0]["content"])["input_ids"]) for row in chat_rows)
    assert Evaluation([task], tokenizer, max_new_tokens=2)._room(task) > longest


@pytest.mark.parametrize("rows", [[{"text": "The harbour opens at six and closes late."}] * 3, None])
def test_text_and_tokens_without_rows_are_shown_too(rows, chat_rows, tokenizer):
    task = EvalTask.of("text", "measure", rows or chat_rows[:3], tokenizer)
    task = task if rows else EvalTask("text", "measure", task.examples)
    evaluation = Evaluation([task], tokenizer, max_new_tokens=3)
    evaluation.before(tiny_llama())
    [found] = evaluation.after(tiny_llama())
    assert len(found.completions) == 3
    assert all(item.prompt and item.expected for item in found.completions)


def test_ready_batches_keep_what_they_supervise(chat_rows, tokenizer):
    examples = EvalTask.of("chat", "measure", chat_rows[:1], tokenizer).examples
    evaluation = Evaluation([EvalTask("chat", "measure", examples)], tokenizer, max_new_tokens=2)
    [found] = evaluation.before(tiny_llama())
    assert found.completions[0].expected == chat_rows[0]["completion"][0]["content"]


def test_a_model_that_broke_has_no_loss_a_note_and_does_not_pass_the_gate(evaluation):
    model = moved(tiny_llama(), by=0.2)
    evaluation.before(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    [found] = evaluation.after(model)
    assert found.after.loss == found.drift == NOT_MEASURED
    assert "not finite on 26 of 26 rows" in found.notes[0]
    assert retention_gate([found], 0.5)


def test_results_survive_strict_json(evaluation):
    model = tiny_llama()
    evaluation.before(model)
    results = evaluation.after(moved(model))
    text = json.dumps([result.to_dict() for result in results], allow_nan=False)
    assert [TaskResult.from_dict(item) for item in json.loads(text)] == results


def test_two_tasks_of_one_name_are_refused(task, tokenizer):
    with pytest.raises(UsageError, match="Two tasks have the name"):
        Evaluation([task, task], tokenizer)


def test_an_adapter_on_the_lm_head_is_refused_before_training(evaluation):
    model = get_peft_model(tiny_llama(tie=False), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(IncompatibleError, match="modules_to_save"):
        evaluation.before(model)


# ---- leaves no trace -----------------------------------------------------------------------------------------------


def state_of(model) -> dict:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "trainable": [weight.requires_grad for weight in model.parameters()],
        "grads": [weight.grad is None for weight in model.parameters()],
        "cache": inner.config.use_cache,
        "generation": inner.generation_config.to_dict(),
        "weights": [weight.sum().item() for weight in model.parameters()],
        "attributes": sorted(vars(inner)),
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("peft", [False, True])
def test_the_model_is_given_back_as_it_was(chat_rows, tokenizer, peft):
    model = tiny_llama()
    if peft:
        config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    else:
        model.model.embed_tokens.weight.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.config.use_cache = False
    next(module for module in model.modules() if not list(module.children())).eval()  # one mode unlike the others
    before = state_of(model)
    tasks = [EvalTask.of("chat", "protect", chat_rows[:5], tokenizer, metric="exact_match")]
    evaluation = Evaluation(tasks, tokenizer, max_new_tokens=3)
    evaluation.before(model)
    evaluation.after(model)
    assert state_of(model) == before
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()  # and can be trained
    assert all(weight.grad is not None for weight in weights)


def test_the_model_is_given_back_when_the_evaluation_breaks(evaluation, monkeypatch):
    model = tiny_llama().train()
    before = state_of(model)
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.before(model)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("peft", [False, True])
def test_around_a_real_training_by_trl(tmp_path, tie, peft, dtype):
    """TRL's SFTTrainer patches the model's forward; scores and answers are those of an unpatched model all the same."""
    tokenizer = tiny_tokenizer()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if peft else None
    trainer = training.trainer(tmp_path, model=tiny_llama(tie=tie, dtype=dtype), cls=trl.SFTTrainer, peft_config=config)
    tasks = [EvalTask.of("protect", "protect", training.PROTECT[:6], tokenizer, metric="exact_match")]
    evaluation = Evaluation(tasks, tokenizer, completions=2, max_new_tokens=4)
    evaluation.before(trainer.model)
    trainer.train()
    [found] = evaluation.after(trainer.model)

    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    fresh = tiny_llama(tie=tie, dtype=dtype)
    again = Evaluation(tasks, tokenizer, completions=2, max_new_tokens=4)
    [start] = again.before(fresh)
    if peft:
        fresh = get_peft_model(fresh, config)
    fresh.load_state_dict(trainer.model.state_dict())
    [end] = again.after(fresh)
    assert found.before.loss.value == pytest.approx(start.before.loss.value, rel=tolerance)
    assert found.after.loss.value == pytest.approx(end.after.loss.value, rel=tolerance)
    assert found.drift.value == pytest.approx(end.drift.value, rel=10 * tolerance)
    assert found.drift.value > 0
    if dtype == torch.float32:
        assert found.completions == end.completions


def test_training_with_an_evaluation_before_it_is_bit_identical_to_training_without(tmp_path):
    one = training.trainer(tmp_path / "one", cls=trl.SFTTrainer)
    one.train()
    two = training.trainer(tmp_path / "two", cls=trl.SFTTrainer)
    rows = Dataset.from_list(training.PROTECT[:6])
    Evaluation([EvalTask.of("protect", "protect", rows, tiny_tokenizer())], tiny_tokenizer()).before(two.model)
    two.train()
    assert training.same(training.weights_of(one), training.weights_of(two))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_drift_is_that_of_the_cpu_and_generators_of_the_device_stay(chat_rows):
    """Would prove that hidden states and head come back from the CPU to the device, in bf16 under autocast too."""
    tokenizer = tiny_tokenizer()
    tasks = [EvalTask.of("chat", "protect", chat_rows, tokenizer)]
    drifts = {}
    for device in ("cpu", "cuda"):
        model = tiny_llama().to(device)
        evaluation = Evaluation(tasks, tokenizer, max_new_tokens=3)
        state = torch.cuda.get_rng_state()
        evaluation.before(model)
        shift = moved(tiny_llama()).to(device)
        drifts[device] = evaluation.after(shift)[0].drift.value
        assert torch.equal(state, torch.cuda.get_rng_state())
    assert drifts["cuda"] == pytest.approx(drifts["cpu"], rel=1e-2)
    evaluation = Evaluation(tasks, tokenizer, autocast=partial(torch.autocast, "cuda", torch.bfloat16))
    model = tiny_llama().to("cuda")
    evaluation.before(model)
    assert evaluation.after(model)[0].drift == Estimate(0, 0, 0)


# ---- the gate ------------------------------------------------------------------------------------------------------


def result(name="chat", role="protect", retention=NOT_MEASURED, before=0.6, after=0.5) -> TaskResult:
    found = TaskResult(name, role, rows=20, tokens=100, retention=retention)
    found.before = Level(token_accuracy=Estimate(before))
    found.after = Level(token_accuracy=Estimate(after))
    return found


def test_the_gate_judges_protect_tasks_by_the_point_and_shows_the_interval():
    lost = result(retention=Estimate(0.833, 0.7, 0.96))
    kept = result("code", retention=Estimate(0.96, 0.9, 1.0))
    unasked = result("facts", "measure", retention=Estimate(0.1))
    [said] = retention_gate([lost, kept, unasked], 0.95)
    assert said == "chat: retention 0.833 [0.700, 0.960] (token accuracy 0.600 -> 0.500); expected at least 0.95."
    assert retention_gate([lost, kept], 0.8) == []
    [said] = retention_gate([result(retention=Estimate(0.9496))], 0.95)
    assert "retention 0.949 (" in said  # not 0.950, which would be enough


def test_the_gate_does_not_open_for_what_was_not_measured():
    assert "undefined" in retention_gate([result(before=0.0)], 0.5)[0]
    assert "was not measured" in retention_gate([result(after=None)], 0.5)[0]
    assert "No protect task was measured" in retention_gate([result(role="learn", retention=Estimate(1.0))], 0.5)[0]


@pytest.mark.parametrize("threshold", [float("nan"), 0, -1, float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(UsageError, match="expected a number above 0"):
        retention_gate([], threshold)
