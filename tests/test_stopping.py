"""Claims about ending a run early: when, why, that it is said and saved, and that looking changes nothing."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import training
from commands import make_place, same_file, words
from tiny import tiny_tokenizer
from training import PROTECT
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_ftplus.cli import main
from hf_ftplus.conditions import StopWhen, read
from hf_ftplus.errors import UsageError
from hf_ftplus.stopping import LearnPlateaus, evaluations_before_the_end

# ---- what the user types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], StopWhen()),
        (["learn-plateaus"], StopWhen(patience=3)),
        (["learn-plateaus:5", "retention-falls-below 0.95"], StopWhen(patience=5, retention=0.95)),
        (["learn-plateaus:1:0.01", "retention-falls-below=1"], StopWhen(patience=1, nats=0.01, retention=1.0)),
    ],
)
def test_conditions_are_read_as_typed(given, meant):
    assert read(given) == meant


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["learn-plateau"], "Did you mean 'learn-plateaus'"),
        (["bored"], "expected learn-plateaus or 'retention-falls-below X'"),
        (["learn-plateaus:0"], "such as learn-plateaus:3"),
        (["learn-plateaus:2.5"], "such as learn-plateaus:3"),
        (["learn-plateaus:3:-1"], "NATS per token of 0 or more"),
        (["learn-plateaus:3:nan"], "NATS per token of 0 or more"),
        (["learn-plateaus:3:0:1"], "such as learn-plateaus:3"),
        (["retention-falls-below"], "--stop-when 'retention-falls-below 0.95'"),
        (["retention-falls-below 95"], "above 0 and up to 1"),
        (["retention-falls-below nan"], "above 0 and up to 1"),
        (["retention-falls-below 0.9 0.8"], "above 0 and up to 1"),
        (["learn-plateaus", "learn-plateaus:5"], "given twice"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        read(given)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that knows the protect rows, so that there is something to lose."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    taught = training.trainer(
        folder / "taught", learn=PROTECT, protect=None, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8
    )
    taught.train()
    taught.model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "held_out.jsonl").write_bytes((folder / "learn.jsonl").read_bytes())
    return folder


def run(place, out, *more, code=0, steps=10, **kwargs):
    few = ["--max_steps", str(steps), "--completions", "0", "--logging_steps", "1", "--save_strategy", "no"]
    assert main(words(place, out, *few, *more, **{"plugin": None, **kwargs})) == code
    path = out / "ftplus" / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def log_of(out, step):
    return json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def test_a_plateau_ends_the_run_and_the_report_says_why(place, tmp_path, capsys):
    """No loss falls by a hundred nats, so the first evaluation is the best and the third one too many."""
    held_out = ["--measure", f"learn={place / 'held_out.jsonl'}", "--stop-when", "learn-plateaus:2:100"]
    report = run(place, tmp_path / "out", *held_out, steps=20)
    assert report["facts"]["steps"] == 6
    assert "stopped at step 6 of 20: eval_loss is " in report["facts"]["stopped"]
    assert "did not get better by more than 100 in 2 evaluations in a row" in report["facts"]["stopped"]
    assert "stopped at step 6 of 20" in capsys.readouterr().out
    assert report["facts"]["config"]["training"]["load_best_model_at_end"] is False
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_lost_retention_is_saved_said_and_ends_the_run(place, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--learning_rate", "3e-2", "--stop-when", "retention-falls-below 0.9"]
    report = run(place, out, *asked, plugin="ewc", steps=20)
    step, stopped = report["facts"]["steps"], report["facts"]["stopped"]
    assert step in range(2, 20, 2)
    assert stopped.startswith(f"stopped at step {step} of 20: protect keeps 0.")
    assert "of its token accuracy" in stopped
    assert "less than 0.9 (retention-falls-below)" in stopped
    assert "stopped at step" in capsys.readouterr().out
    assert (out / f"checkpoint-{step}" / "ftplus" / "ewc.safetensors").is_file()
    log = log_of(out, step)
    looks = {entry["step"]: entry["retention/protect"] for entry in log if "retention/protect" in entry}
    assert list(looks) == list(range(2, step + 1, 2))
    assert all(kept >= 0.9 for kept in list(looks.values())[:-1])
    assert looks[step] < 0.9
    assert "measuring on the way" in report["facts"]["seconds"]
    [protect] = [task for task in report["tasks"] if task["name"] == "protect"]
    assert protect["retention"]["value"] == pytest.approx(looks[step])
    [drift] = [entry["drift/protect"] for entry in log if entry["step"] == step and "drift/protect" in entry]
    assert protect["drift"]["value"] == pytest.approx(drift)
    assert "drift/protect over steps" in (out / "ftplus" / "report.html").read_text()
    training_log = {entry["step"] for entry in log if {"loss", "mean_token_accuracy"} <= entry.keys()}
    assert training_log == set(range(1, step + 1))  # looking took no figure of training away
    (out / "ftplus" / "report.json").unlink()  # as if it had been killed before
    again = run(place, out, *asked, "--resume_from_checkpoint", "true", plugin="ewc", steps=20)
    assert [again["facts"]["steps"], again["facts"]["stopped"]] == [step, stopped]


@pytest.mark.parametrize("strategy", [["--eval_strategy", "steps", "--eval_steps", "3"], ["--eval_strategy", "epoch"]])
def test_conditions_are_judged_when_the_user_says(place, tmp_path, strategy):
    """24 rows in batches of 8 are an epoch of three steps."""
    held_out = ["--measure", f"learn={place / 'held_out.jsonl'}", "--save_strategy", "steps", "--save_steps", "12"]
    asked = ["--stop-when", "learn-plateaus", "--stop-when", "retention-falls-below 0.01"]
    report = run(place, tmp_path / "out", *held_out, *strategy, *asked, steps=12)
    log = log_of(tmp_path / "out", 12)
    for figure in ("eval_loss", "retention/protect", "drift/protect"):
        assert [entry["step"] for entry in log if figure in entry and entry["step"] < 12] == [3, 6, 9]
    assert report["facts"]["stopped"] is None


@pytest.mark.parametrize(
    "evaluates", [["steps", "--eval_steps", "20"], ["steps", "--eval_steps", "5", "--eval_delay", "18"], ["epoch"]]
)
def test_evaluating_at_the_end_alone_does_not_keep_retention_from_being_looked_at(place, tmp_path, caplog, evaluates):
    """24 rows in batches of 2 are an epoch of twelve steps."""
    batches = ["--per_device_train_batch_size", "2"] if evaluates == ["epoch"] else []
    held_out = ["--measure", f"learn={place / 'held_out.jsonl'}", "--learning_rate", "3e-2", *batches]
    asked = ["--stop-when", "retention-falls-below 0.9", "--stop-when", "learn-plateaus", "--eval_strategy", *evaluates]
    report = run(place, tmp_path / "out", *held_out, *asked, steps=12 if batches else 20)
    assert "(retention-falls-below)" in report["facts"]["stopped"]
    assert report["facts"]["steps"] in range(2, 12 if batches else 20, 2)
    assert "evaluates at the end alone, which stops nothing: retention-falls-below looks by itself" in caplog.text
    assert (
        "learn-plateaus cannot end this run: it takes 4 evaluations before the last step, and there are 0"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("when", "steps", "epochs", "looks"),
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, 20, 2, 3),
        ({"eval_strategy": "steps", "eval_steps": 5}, 21, 2, 4),
        ({"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 6}, 20, 2, 2),
        ({"eval_strategy": "steps", "eval_steps": 50}, 20, 2, 0),
        ({"eval_strategy": "epoch"}, 20, 4, 3),
        ({"eval_strategy": "epoch", "eval_delay": 2}, 20, 4, 2),
        ({"eval_strategy": "epoch"}, 20, sys.maxsize, 0),  # a stream
    ],
)
def test_evaluations_before_the_end_are_counted(tmp_path, when, steps, epochs, looks):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **when)
    state = TrainerState(max_steps=steps, num_train_epochs=epochs, eval_steps=when.get("eval_steps", 500))
    assert evaluations_before_the_end(args, state) == looks


def test_looking_changes_no_bit_of_training(place, tmp_path):
    """With dropout, whose next numbers a data loader would otherwise draw for itself."""
    lora = ["--use_peft", "--lora_r", "2", "--lora_dropout", "0.5", "--lora_target_modules", "all-linear"]
    measured = ["--measure", f"learn={place / 'held_out.jsonl'}"]
    asked = ["--stop-when", "learn-plateaus:99", "--stop-when", "retention-falls-below 0.01"]
    run(place, tmp_path / "plain", *lora, *measured)
    run(place, tmp_path / "asked", *lora, *measured, *asked)
    assert same_file(*(tmp_path / name / "adapter_model.safetensors" for name in ("plain", "asked")))


@pytest.mark.parametrize("best", [{}, {"metric_for_best_model": "eval_one_loss"}], ids=["together", "one of them"])
def test_several_tasks_level_off_together_or_by_one_of_them(place, tmp_path, best):
    """By one loss, of the held-out rows of all that have some; or of the task that was named."""
    config = tmp_path / "run.yaml"
    tasks = [
        {"name": name, "dataset": str(place / "learn.jsonl"), **more}
        for name, more in (("one", {"measure": str(place / "held_out.jsonl")}), ("two", {"measure": False}))
    ]
    tasks.append({"name": "three", "dataset": str(place / "protect.jsonl"), "measure": str(place / "protect.jsonl")})
    config.write_text(json.dumps({"tasks": tasks, "stop_when": "learn-plateaus:2:100", **best}))
    line = words(place, tmp_path / "out", "--config", str(config), "--max_steps", "20", plugin=None, protect=None)
    at = line.index("--dataset_name")
    assert main(line[:at] + line[at + 2 :]) == 0
    facts = json.loads((tmp_path / "out" / "ftplus" / "report.json").read_text())["facts"]
    assert facts["steps"] == 6


def test_rows_that_are_trained_on_cannot_tell_a_plateau(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    run(place, tmp_path / "out", "--stop-when", "learn-plateaus", code=3)
    assert "--measure learn=DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "kwargs", "says"),
    [
        (["--measure_rows", "0"], {}, "needs a measurement, but --measure-rows is 0"),
        ([], {"protect": None}, "has no protect task to judge"),
    ],
)
def test_retention_that_nobody_measures_is_refused(place, tmp_path, capsys, more, kwargs, says):
    run(place, tmp_path / "out", "--stop-when", "retention-falls-below 0.9", *more, code=2, **kwargs)
    assert f"--stop-when retention-falls-below {says}" in capsys.readouterr().err


def test_a_start_that_gets_nothing_right_cannot_be_judged(place, tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "zq", "completion": "\\u00e9"}\n' * 5)
    more = ["--protect", f"odd={tmp_path / 'odd.jsonl'}", "--stop-when", "retention-falls-below 0.9"]
    run(place, tmp_path / "out", *more, code=4, protect=None)
    assert "got no token right" in capsys.readouterr().err


# ---- resumed ---------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends training after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def evaluated(folder, *callbacks):
    """Evaluates and saves at each of ten steps."""
    it = training.trainer(folder, callbacks=list(callbacks), max_steps=10, save_strategy="steps", save_steps=1)
    it.eval_dataset, it.args.eval_strategy, it.args.eval_steps = it.train_dataset, IntervalStrategy.STEPS, 1
    it.args.metric_for_best_model, it.args.greater_is_better = "loss", False
    return it


def test_a_resumed_run_goes_on_counting(tmp_path):
    evaluated(tmp_path, LearnPlateaus(4, 100.0), Stop(3)).train()
    again = evaluated(tmp_path, LearnPlateaus(4, 100.0))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5  # 1 is the best; 2, 3, 4 and 5 are not better
    over = evaluated(tmp_path, LearnPlateaus(4, 100.0))
    over.train(resume_from_checkpoint=True)
    assert over.state.global_step == 5


def test_a_condition_may_be_new_when_a_run_is_resumed(tmp_path, caplog):
    evaluated(tmp_path, Stop(2)).train()
    again = evaluated(tmp_path, LearnPlateaus(2, 100.0))
    with caplog.at_level(logging.INFO, logger="hf_ftplus"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert "learn-plateaus: evaluating every 1 steps, patience 2" in caplog.text
