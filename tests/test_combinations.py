"""Every strategy with every kind of training: it trains, or is refused in words before anything is measured.

`TABLE` is the documentation of both. Below it is what the options of TRL might break without a word: each test would
fail if a strategy's figures, memory or gradients came from other tokens, other noise or other weights than they should.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from commands import make_place, words
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from tiny import MARKED, tiny_llama, tiny_tokenizer
from training import LEARN, PROTECT, arguments, far, first_gradient, same, trainer, weights_of
from transformers import EarlyStoppingCallback

from hf_ftplus import EWC, Batch, Run, Strategy
from hf_ftplus.cli import main
from hf_ftplus.errors import DataError, IncompatibleError, UsageError
from hf_ftplus.logits import hidden_states
from hf_ftplus.refusals import refuse
from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategies.si import SI

MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS = {
    "full": None,
    "LoRA": LoraConfig(r=2, target_modules="all-linear"),
    "LoRA of the MLPs": LoraConfig(r=2, target_modules=MLP),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "modules_to_save": LoraConfig(r=2, target_modules=MLP, modules_to_save=["lm_head"]),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
ROWS = {
    "plain": [],
    "ewc": ["ewc"],
    "si": ["si"],
    "distill on protect": [("distill", {"on": "protect", "share": 1.0})],
    "distill on learn": [("distill", {"on": "learn"})],
    "replay": ["replay"],
    "multitask": [("multitask", {"weights": "even=1,odd=3"})],
    "replay + ewc + distill": ["replay", "ewc", ("distill", {"share": 1.0})],
    "multitask + replay + distill": [
        ("multitask", {"weights": "even=1,odd=3"}), "replay", ("distill", {"share": 1.0})
    ],
}  # fmt: skip
TRAINS = ""
NOT_BA = r"does not change a weight by scale \* B A"
ADAPTER = r"si cannot follow an adapter.*Use --plugin ewc.*or fine-tune all weights"
VIRTUAL = r"distill compares .* virtual tokens.*Use LoRA or full fine-tuning"
TABLE = {
    #                          full    LoRA     MLPs     rsLoRA   DoRA     saved    prompt   IA3
    "plain":                  (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS),
    "ewc":                    (TRAINS, TRAINS,  TRAINS,  TRAINS,  NOT_BA,  TRAINS,  NOT_BA,  NOT_BA),
    "si":                     (TRAINS, ADAPTER, ADAPTER, ADAPTER, ADAPTER, ADAPTER, ADAPTER, ADAPTER),
    "distill on protect":     (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  VIRTUAL, TRAINS),
    "distill on learn":       (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  VIRTUAL, TRAINS),
    "replay":                 (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS),
    "multitask":              (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS),
    "replay + ewc + distill": (TRAINS, TRAINS,  TRAINS,  TRAINS,  NOT_BA,  TRAINS,  NOT_BA,  NOT_BA),
    "multitask + replay + distill":
                              (TRAINS, TRAINS,  TRAINS,  TRAINS,  TRAINS,  TRAINS,  VIRTUAL, TRAINS),
}  # fmt: skip
"""What a strategy refuses, as its message says it; TRAINS: weights move, and what the strategy does is not zero."""
ACTS = {
    "ewc": "ewc/penalty",
    "si": "si/explained",
    "distill on protect": "distill/kl_protect",
    "distill on learn": "distill/kl_learn",
}
"""Figures that are not zero where a strategy acts; of those that mix, the rows of each step tell."""
STACKS = {
    "replay + ewc + distill": ["replay", "ewc", "distill on protect"],
    "multitask + replay + distill": ["multitask", "replay", "distill on protect"],
}
CELLS = [(row, kind) for row in ROWS for kind in KINDS]
NUMBERED = [{**row, "task": "odd" if i % 2 else "even"} for i, row in enumerate(LEARN[:8])]


@pytest.mark.fault("D4")
@pytest.mark.parametrize(("row", "kind"), CELLS, ids=lambda word: word.replace(" ", "-"))
def test_it_trains_or_is_refused(tmp_path, row, kind):
    def made():
        return trainer(
            tmp_path, *ROWS[row], learn=NUMBERED if "multitask" in row else LEARN[:8], protect=PROTECT[:4],
            model=tiny_llama(layers=1), peft_config=copy.deepcopy(KINDS[kind]), max_steps=3, logging_steps=1,
            learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip

    if reason := TABLE[row][list(KINDS).index(kind)]:
        with pytest.raises(IncompatibleError, match=reason):
            made()
        return
    it = made()
    read = texts_read(it)
    start = [weight.detach().clone() for weight in it.model.parameters() if weight.requires_grad]
    it.train()
    ends = [weight.detach() for weight in it.model.parameters() if weight.requires_grad]
    assert any(not torch.equal(one, other) for one, other in zip(start, ends, strict=True))
    logs = it.state.log_history
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)
    for name in STACKS.get(row, [row]):
        assert name not in ACTS or any(log.get(ACTS[name], 0.0) > 1e-9 for log in logs), (ACTS[name], logs)
    kinds = Counter(re.search("Question|Name number (\\d)", text)[1] for text in read)
    assert kinds.pop(None, 0) == ("replay" in row), read  # of the nine rows of an epoch
    if "multitask" in row:
        assert sum(kinds[digit] for digit in "1357") == 3 * sum(kinds[digit] for digit in "0246"), kinds


def texts_read(it) -> list[str]:
    """What stands in each row that the trainer is about to train on."""
    texts, step = [], it.training_step

    def training_step(model, inputs, *args, **kwargs):
        texts.extend(it.processing_class.batch_decode(inputs["input_ids"]))
        return step(model, inputs, *args, **kwargs)

    it.training_step = training_step
    return texts


# ---- on the command line ---------------------------------------------------------------------------------------------

FLAGS = {
    "LoRA": ["--lora_target_modules", "all-linear"],
    "LoRA of the MLPs": ["--lora_target_modules", *MLP],
    "rsLoRA": ["--lora_target_modules", "all-linear", "--use_rslora", "true"],
    "DoRA": ["--lora_target_modules", "all-linear", "--use_dora", "true"],
}
PLUGINS = {
    "plain": [],
    "ewc": ["--plugin", "ewc"],
    "si": ["--plugin", "si"],
    "distill on protect": ["--plugin", "distill", "--set", "distill.on=protect"],
    "distill on learn": ["--plugin", "distill", "--set", "distill.on=learn"],
    "replay": ["--plugin", "replay"],
    "multitask": ["--plugin", "multitask"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("place"))
    (place / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NUMBERED))
    return place


@pytest.mark.parametrize("kind", FLAGS, ids=lambda word: word.replace(" ", "-"))
@pytest.mark.parametrize("row", PLUGINS, ids=lambda word: word.replace(" ", "-"))
def test_the_command_line_accepts_and_refuses_the_same(place, tmp_path, capsys, monkeypatch, row, kind):
    reason = TABLE[row][list(KINDS).index(kind)]
    if reason:
        monkeypatch.setattr("hf_ftplus.run.sft_trainer", None)  # no model may load
    more = [*PLUGINS[row], "--dataset_name", str(place / "numbered.jsonl"), "--use_peft", "true", "--lora_r", "2"]
    line = words(place, tmp_path / "out", *more, *FLAGS[kind], "--dry-run", "--measure_rows", "0", plugin=None)
    assert main(line) == (IncompatibleError.exit_code if reason else 0)
    shown, said = capsys.readouterr()
    assert re.search(reason, said, re.DOTALL)
    assert ("Dry run: nothing was trained" in shown) is not bool(reason)


# ---- options of TRL --------------------------------------------------------------------------------------------------

CHATS = [
    {"messages": [{"role": "user", "content": f"Name number {i}."}, {"role": "assistant", "content": f"Lantern {i}."}]}
    for i in range(8)
]


@dataclass
class Listener(Strategy):
    """Writes down which tokens are compared, what the student says there, and what distill's teacher says."""

    name: ClassVar[str] = "listener"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heard: list[tuple[Batch, torch.Tensor]] = []

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        (distill,) = (strategy for strategy in run.strategies if strategy.name == "distill")
        self.heard.append((batch, distill.source(batch.inputs)[0]))
        return batch.hidden.sum() * 0.0


@pytest.mark.filterwarnings("ignore:.label_smoothing_factor. is deprecated")
def test_another_loss_of_the_task_changes_nothing_of_what_distill_adds(tmp_path):
    """DFT scales each token of the task's loss by its probability; labels that are smoothed take a pass of their own,
    and another one, without gradients, for figures. A nat of KL stays a nat."""
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    other = tiny_llama(seed=1)
    other.save_pretrained(tmp_path / "other"), tiny_tokenizer().save_pretrained(tmp_path / "other")
    distill = ("distill", {"on": "both", "share": 1.0, "strength": 0.5, "teacher": str(tmp_path / "other")})
    added = []
    for loss in ({}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.2}):
        with_it, plain = (first_gradient(tmp_path, *strategies, **loss, **how)[0] for strategies in ([distill], []))
        added.append({name: with_it[name] - plain[name] for name in plain})
    assert far(first_gradient(tmp_path, loss_type="dft", **how)[0], first_gradient(tmp_path, **how)[0]) > 1e-3
    assert max(gradient.abs().max() for gradient in added[0].values()) > 1e-3
    assert max(far(added[0], other) for other in added[1:]) < 1e-6


def test_noise_on_embeddings_reaches_the_student_alone(tmp_path):
    listener = Listener()
    trainer(tmp_path, Distill(on="both", share=1.0), listener, neftune_noise_alpha=5.0, learning_rate=0.0).train()
    for batch, said in listener.heard:
        with torch.no_grad():
            clean, _ = hidden_states(tiny_llama(), batch.inputs)
        torch.testing.assert_close(said, clean)
        assert (batch.hidden - clean).abs().max() > 0.1


@pytest.mark.parametrize("strategy", [EWC(strength=0.0), Distill(on="both", share=1.0, strength=1e-30)], ids=repr)
def test_a_strategy_takes_nothing_from_the_noise_of_the_learn_rows(tmp_path, strategy):
    how = {"neftune_noise_alpha": 5.0, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    ends = []
    for folder, strategies in (("with", [strategy]), ("plain", [])):
        it = trainer(tmp_path / folder, *strategies, **how)
        it.train()
        ends.append(weights_of(it))
    assert same(*ends)


def test_what_is_remembered_was_measured_without_noise(tmp_path):
    """At a learning rate of 0 there is nothing else in which the two runs differ."""
    for folder, noise in (("clean", None), ("noisy", 5.0)):
        trainer(tmp_path / folder, "ewc", neftune_noise_alpha=noise, learning_rate=0.0).train()
    clean, noisy = (load_file(tmp_path / it / "ftplus" / "memory" / "ewc.safetensors") for it in ("clean", "noisy"))
    assert same(clean, noisy)


def test_only_turns_of_the_assistant_are_compared(tmp_path):
    listener = Listener()
    it = trainer(
        tmp_path, "replay", Distill(on="learn"), listener, learn=CHATS, protect=CHATS, template=MARKED,
        assistant_only_loss=True, max_steps=2,
    )  # fmt: skip
    it.train()
    said = [tiny_tokenizer().decode(batch.labels) for batch, _ in listener.heard]
    assert all("Lantern" in text and "Name" not in text and "user" not in text for text in said)
    assert all(len(hidden) == len(batch.labels) for batch, hidden in listener.heard)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_stopped_early_with_the_best_weights_back_the_memory_is_of_those(tmp_path, kind):
    """The evaluation loss falls, and the highest is called the best: that of step 2, after which patience ends."""

    def left(folder, **kwargs):
        it = trainer(
            tmp_path / folder, "replay", EWC(strength=100.0), peft_config=copy.deepcopy(KINDS[kind]), logging_steps=1,
            lr_scheduler_type="constant", learning_rate=1e-3, held_out={"a": Dataset.from_list(LEARN[:4]), "b": Dataset.from_list(PROTECT[:4])},
            eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, **kwargs,
        )  # fmt: skip
        it.train()
        return it, load_file(tmp_path / folder / "ftplus" / "memory" / "ewc.safetensors")

    stopped, memory = left(
        "best", max_steps=12, load_best_model_at_end=True, metric_for_best_model="eval_a_loss", greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    short, expected = left("short", max_steps=2)
    assert stopped.state.global_step == 6
    assert same(weights_of(stopped), weights_of(short))
    assert same(memory, expected)
    assert not same(memory, left("whole", max_steps=6)[1])


@pytest.mark.parametrize("how", ["bfd", "wrapped"])
def test_replayed_rows_in_packed_pieces_find_their_answers_or_say_that_they_cannot(tmp_path, how):
    """Wrapped pieces begin anywhere; nothing tells which rows they are of."""
    it = trainer(
        tmp_path, ("replay", {"share": 0.5}), Distill(on="learn", cache=True), packing=True, packing_strategy=how,
        per_device_train_batch_size=2,
    )  # fmt: skip
    if how == "wrapped":
        with pytest.raises(IncompatibleError, match=r"packing_strategy wrapped.*cache=false"):
            it.train()
    else:
        it.train()
        assert any(log.get("distill/kl_learn", 0.0) > 0 for log in it.state.log_history)


# ---- several at once -------------------------------------------------------------------------------------------------


@pytest.mark.fault("C8")
def test_all_of_them_at_once_act_and_end_alike_in_any_order(tmp_path):
    """Without any one of those that pull, the end is another: the others do not undo it."""
    taught = trainer(tmp_path / "first", "si", "ewc")
    taught.train()
    start, memory = copy.deepcopy(taught.model.state_dict()), tmp_path / "first" / "ftplus" / "memory"
    stack = ["multitask", "replay", EWC(strength=10.0), SI(strength=0.02), Distill(strength=3.0, share=1.0)]

    def end(folder, strategies):
        model = tiny_llama()
        model.load_state_dict(start)
        it = trainer(
            tmp_path / folder, *strategies, model=model, memory=memory, learn=NUMBERED, optim="sgd",
            learning_rate=0.05, max_grad_norm=0.0,
        )  # fmt: skip
        it.train()
        return weights_of(it)

    whole = end("whole", stack)
    assert far(whole, end("reversed", stack[::-1])) < 1e-6
    for number in (2, 3, 4):
        assert far(whole, end(f"without {number}", [*stack[:number], *stack[number + 1 :]])) > 1e-5, stack[number]


def test_a_share_of_tokens_is_counted_after_all_others_have_mixed(tmp_path):
    tokens = ("replay", {"unit": "tokens"})
    trainer(tmp_path, "multitask", tokens, learn=NUMBERED)
    with pytest.raises(UsageError, match=r"multitask mixes the rows anew.*--plugin multitask --plugin replay"):
        trainer(tmp_path, tokens, "multitask", learn=NUMBERED)


@pytest.mark.fault("C8")
def test_a_strategy_may_refuse_another_by_name_before_anything_is_read(tmp_path):
    @dataclass
    class Alone(Strategy):
        """Works beside nothing that pulls on weights."""

        name: ClassVar[str] = "alone"

        def refuse(self, run: Run | None) -> None:
            for other in run.strategies if run else ():
                if other.overrides("before_step"):
                    raise UsageError(f"alone cannot work beside {other.name}. Leave one of them out.")

    trainer(tmp_path, Alone(), "replay")
    for strategies in ((Alone(), "ewc"), ("ewc", Alone())):
        with pytest.raises(UsageError, match="alone cannot work beside ewc"):
            trainer(tmp_path, *strategies, protect="no-such-file.jsonl")


# ---- as early as it is known -----------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there_or_has_other_tokens_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(DataError, match=r"cannot load the teacher 'no/such/model'.*--set distill\.teacher=FOLDER"):
        refuse([Distill(teacher="no/such/model")], arguments(tmp_path))  # as `ftplus sft` does before it loads a model
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tiny_llama().save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleError, match=r"has other tokens"):
        trainer(tmp_path, Distill(teacher=str(tmp_path / "other")))


@pytest.mark.parametrize("strategy", ["ewc", Distill(on="protect"), "replay"], ids=["ewc", "distill", "replay"])
def test_nothing_to_protect_is_refused_before_anything_is_measured(tmp_path, strategy):
    with pytest.raises(DataError, match="no protect data"):
        trainer(tmp_path, strategy, protect=None)
