"""Every fault of the table has a test that carries its id, or a reason why not; what had no other place is tested here."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import sys
import threading
from pathlib import Path

import faults
import pytest
import torch
from commands import make_place, same_file, words
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama
from training import LEARN, PROTECT, arguments, same, trainer, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_ftplus import EWC, SFTTrainer, attach, commit, data, state
from hf_ftplus.cli import main
from hf_ftplus.errors import StorageError
from hf_ftplus.evaluation import Evaluation
from hf_ftplus.examples import tokenize
from hf_ftplus.interrupt import SaveOnInterrupt

HERE = Path(__file__).parent


def marked() -> dict[str, list[str]]:
    """Id -> tests that carry it, read from the files: nothing is imported or run."""
    found: dict[str, list[str]] = {}
    for file in sorted([*HERE.rglob("test_*.py"), *HERE.parent.glob("plugins/*/tests/test_*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for item in mark.args:
                        found.setdefault(ast.literal_eval(item), []).append(f"{file.name}::{node.name}")
    return found


def test_every_fault_has_a_test_or_a_reason():
    tested = marked()
    assert [name for name in faults.REQUIRED if name not in tested and name not in faults.OPEN] == []
    assert [name for name in tested if name not in faults.REQUIRED] == []
    assert [name for name in faults.OPEN if name in tested or name not in faults.REQUIRED] == []


def test_what_was_not_built_is_not_there_and_names_its_fault():
    text = "".join(file.read_text(encoding="utf-8") for file in (HERE.parent / "hf_ftplus").rglob("*.py"))
    assert "fail_if_retention_below" in text
    for flag, why in faults.NOT_BUILT.items():
        assert not re.search(flag.removeprefix("--").replace("-", "[-_]"), text), flag
        assert why.rsplit("(", 1)[1].removesuffix(").") in faults.REQUIRED, why


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


# ---- interruption and storage ----------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.fault("A2")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once_and_handlers_are_given_back(monkeypatch, number, code):
    monkeypatch.setattr("hf_ftplus.interrupt.ONE_PRESS", 0.0)
    before, interrupt = signal.getsignal(number), SaveOnInterrupt()
    thread = threading.Thread(target=interrupt.on_step_begin, args=(None,) * 3)
    thread.start(), thread.join()
    assert signal.getsignal(number) is before  # another thread may not set it
    interrupt.on_step_begin(None, None, None)
    try:
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt) as raised:
            os.kill(os.getpid(), number)
        assert raised.value.args == (code,)
    finally:
        interrupt.restore()
    assert signal.getsignal(number) is before


@pytest.mark.fault("A2")
@pytest.mark.parametrize("steps", [2, 3], ids=["saved with it", "not saved with it"])
def test_a_signal_after_the_last_step_is_heard_and_what_it_trained_is_saved(tmp_path, steps):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    interrupt = SaveOnInterrupt()
    it = trainer(tmp_path, **SAVING, max_steps=steps, callbacks=[interrupt, Late()])
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            it.train()
    finally:
        interrupt.restore()
    assert raised.value.args == (143,)
    assert interrupt.saved
    assert commit.newest(tmp_path) == tmp_path / f"checkpoint-{steps}"


@pytest.mark.fault("A2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_listened_for_a_signal_before_hears_it_while_training(number):
    heard, interrupt = [], SaveOnInterrupt()
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        interrupt.on_step_begin(None, None, None)
        os.kill(os.getpid(), number)
        assert heard == [number]
        assert interrupt._told == number
    finally:
        interrupt.restore()
        os.kill(os.getpid(), number)
        signal.signal(number, before)
    assert heard == [number, number]


@pytest.mark.fault("A4")
@pytest.mark.parametrize(
    ("strategies", "room", "what"),
    [((), 50_000, "weights"), ((), 200_000, "optimizer"), (("ewc",), 200_000, "strategy state")],
    ids=["weights", "optimizer", "state"],
)
def test_a_full_disk_leaves_the_last_whole_checkpoint_and_nothing_half_there(
    tmp_path, monkeypatch, strategies, room, what
):
    whole = trainer(tmp_path / "whole", *strategies, **SAVING)
    whole.train()
    it, soft = trainer(tmp_path / "out", *strategies, **SAVING), resource.getrlimit(resource.RLIMIT_FSIZE)
    save = type(it)._save_checkpoint

    def full(self, *args):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, soft[1]))
        save(self, *args)

    monkeypatch.setattr(type(it), "_save_checkpoint", full)
    try:
        with pytest.raises(
            StorageError, match=r"checkpoint-4 could not be written: .*checkpoint-2 is the last whole one"
        ):
            it.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    again = trainer(tmp_path / "out", *strategies, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same(weights_of(again), weights_of(whole))


@pytest.mark.fault("A4")
def test_too_little_room_is_said_before_the_first_step(place, tmp_path, capsys, caplog, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=200_000))
    assert main(words(place, tmp_path / "out", "--measure_rows", "0")) == 0
    state = next((tmp_path / "out").glob("checkpoint-*/ftplus/ewc.safetensors")).stat().st_size / 1e6
    assert "has room for 0.2 MB; a checkpoint takes about" in caplog.text
    assert f"of which strategies {state:.1f} MB. Free some space" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert main(words(place, tmp_path / "other", "--measure_rows", "0")) == 6
    assert "the trained weights alone take 0 MB. Free some space" in capsys.readouterr().err


@pytest.mark.fault("A9")
def test_out_of_memory_says_what_strategies_hold_and_what_to_type(place, tmp_path, capsys, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(SFTTrainer, "training_step", full)
    assert main(words(place, tmp_path / "out", "--measure_rows", "0")) == 4
    said = capsys.readouterr().err
    assert "Out of memory at step 1: CUDA out of memory. Tried to allocate 20.00 GiB" in said
    assert "8.0 bytes per trained weight. Lower --per_device_train_batch_size" in said


@pytest.mark.fault("A9")
@pytest.mark.parametrize(
    ("place_of_it", "says"),
    [
        (
            (Evaluation, "before"),
            "while measuring before: CUDA is full. Lower --per_device_eval_batch_size or --measure",
        ),
        ((Evaluation, "after"), "while measuring after: CUDA is full. Lower --per_device_eval_batch_size or --measure"),
        ((EWC, "finish"), "after the last step, 2: CUDA is full. The trained model is saved in"),
        ((SFTTrainer, "save_model"), "while saving: CUDA is full. Free some memory"),
    ],
    ids=["before", "after", "finish", "saving"],
)
def test_out_of_memory_is_said_of_the_stage_that_it_ended(place, tmp_path, capsys, monkeypatch, place_of_it, says):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA is full.")

    monkeypatch.setattr(*place_of_it, full)
    few = ["--max_steps", "2", "--save_strategy", "no", "--measure_rows", "4", "--completions", "0"]
    assert main(words(place, tmp_path / "out", *few)) == 4
    said = capsys.readouterr().err
    assert f"Out of memory {says}" in said
    assert "--per_device_train_batch_size" not in said


@pytest.mark.fault("B13")
def test_a_run_that_finishes_twice_remembers_once(place, tmp_path):
    out, si = tmp_path / "out", {"plugin": "si", "protect": None}
    few = ["--measure_rows", "0", "--save_steps", "4", "--max_grad_norm", "0"]
    assert main(words(place, out, *few, **si)) == 0
    (out / "ftplus" / "report.json").unlink()
    memory = shutil.copy(out / "ftplus" / "memory" / "si.safetensors", tmp_path)
    assert main(words(place, out, *few, "--resume_from_checkpoint", "true", **si)) == 0
    assert same_file(Path(memory), out / "ftplus" / "memory" / "si.safetensors")


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("B12")
def test_state_and_commit_of_the_first_release_still_load(tmp_path):
    """`tests/stored/0.1.0` is as it was written then, and never changes."""
    stored = shutil.copytree(HERE / "stored" / "0.1.0", tmp_path / "checkpoint-3")
    found = state.load_checkpoint(stored / "ftplus", {"box": "Box()"}, tiny_llama(layers=1, hidden=8), step=3)["box"]
    assert torch.equal(found["w"], torch.arange(6.0).reshape(2, 3))
    assert found["half"].dtype == torch.bfloat16
    assert commit.read_commit(stored)["step"] == 3
    assert commit.fault(stored) == ""


@pytest.mark.fault("B12")
def test_an_older_format_is_migrated_in_memory_and_its_file_stays(tmp_path, monkeypatch):
    """As if the next version called `files` by another name."""
    stored = shutil.copytree(HERE / "stored" / "0.1.0", tmp_path / "checkpoint-3")
    before = [(stored / "ftplus" / name).read_bytes() for name in ("manifest.json", "commit.json")]
    readers = {
        state: lambda: state.load_checkpoint(stored / "ftplus", {"box": "Box()"}, tiny_llama()),
        commit: lambda: commit.read_commit(stored),
    }
    for module, read in readers.items():
        monkeypatch.setattr(module, "FORMAT", 3)
        with pytest.raises(StorageError, match="is damaged"):  # no step leads there
            read()
        steps = {
            1: lambda old: {**old, "said": "hello"},
            2: lambda old: {**old, "step": old["step"] + len(old["said"])},
        }
        monkeypatch.setattr(module, "MIGRATIONS", steps)
    assert state.load_checkpoint(stored / "ftplus", {"box": "Box()"}, tiny_llama(layers=1, hidden=8), step=8)["box"]
    assert commit.read_commit(stored)["step"] == 8
    assert [(stored / "ftplus" / name).read_bytes() for name in ("manifest.json", "commit.json")] == before


def as_then(tmp_path, *strategies, tokenizer=None, **kwargs):
    """A run of what `tests/stored` holds, with rows of today: TRL may make others of the same text."""
    return SFTTrainer(
        kwargs.pop("model", None) or tiny_llama(seed=1, layers=1, hidden=4, heads=2),
        args=arguments(tmp_path, max_steps=4, logging_steps=1, **kwargs.pop("args", {})),
        train_dataset=Dataset.from_list(LEARN[:8]),
        processing_class=tokenizer or AutoTokenizer.from_pretrained(HERE / "stored" / "0.1.0-ewc" / "checkpoint-2"),
        strategies=list(strategies),
        **kwargs,
    )


@pytest.mark.fault("B12")
@pytest.mark.parametrize(
    ("name", "strategies", "more"),
    [
        ("0.1.0-ewc", ["ewc"], {}),
        (
            "0.1.0-lora",
            ["ewc", "distill"],
            {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), "args": {"max_grad_norm": 0.0}},
        ),
    ],
    ids=["all weights", "LoRA"],
)
def test_a_run_of_the_first_release_goes_on(tmp_path, monkeypatch, name, strategies, more):
    """`tests/stored` has its checkpoints as they were written then."""
    monkeypatch.setattr("hf_ftplus.origin.rows", lambda *args: None)
    stored = shutil.copytree(HERE / "stored" / name / "checkpoint-2", tmp_path / "checkpoint-2")
    more = {**more, "args": {**more.get("args", {}), **SAVING}}
    it = as_then(tmp_path, *strategies, protect=PROTECT[:4], **more)
    it.train(resume_from_checkpoint=str(stored))
    assert it.state.global_step == 4
    for strategy in strategies:
        said = [value for log in it.state.log_history for key, value in log.items() if key.startswith(f"{strategy}/")]
        assert said, strategy
    assert [log["ewc/penalty"] > 0 for log in it.state.log_history if "ewc/penalty" in log] == [True, True]
    assert not commit.fault(tmp_path / "checkpoint-4")


@pytest.mark.fault("B12")
def test_a_memory_of_the_first_release_is_held(tmp_path):
    """`tests/stored/0.1.0-memory` is what EWC and SI left then, with the model that they left it with."""
    stored = HERE / "stored" / "0.1.0-memory"
    model = AutoModelForCausalLM.from_pretrained(stored)
    it = as_then(tmp_path, "ewc", "si", model=model, memory=stored / "memory", args={"max_grad_norm": 0.0})
    it.train()
    for penalty in ("ewc/penalty", "si/penalty"):
        held = [log[penalty] for log in it.state.log_history if penalty in log]
        assert held[0] < held[-1], penalty


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E15")
def test_a_line_of_5_mb_is_read_and_cut(tokenizer, tmp_path):
    text = "The last boat is home. " * 220_000
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Say. ", "completion": words}) + "\n" for words in ("Hm.", text)))
    rows = data.load(str(file))
    assert len(rows[1]["completion"]) == len(text)
    found = tokenize(rows, tokenizer, 64, "long")
    assert max(len(example["input_ids"]) for example in found.examples) == 64


# ---- security and privacy --------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("name", ["box.safetensors", "box.pt", "manifest.json", "commit.json"])
def test_a_pickle_is_never_loaded_as_state(tmp_path, name):
    shutil.copytree(HERE / "stored" / "0.1.0", tmp_path / "checkpoint-3")
    folder, marker = tmp_path / "checkpoint-3" / "ftplus", tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    if name == "box.pt":
        (folder / "box.safetensors").unlink()
    assert commit.fault(tmp_path / "checkpoint-3")
    if name != "commit.json":
        with pytest.raises(StorageError):
            state.load_checkpoint(folder, {"box": "Box()"}, tiny_llama(layers=1, hidden=8))
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()


@pytest.mark.fault("F1")
def test_resuming_unpickles_nothing(tmp_path):
    trainer(tmp_path, "ewc", **SAVING).train()
    it, looking, found = trainer(tmp_path, "ewc", **SAVING), [True], []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" and looking else None)
    try:
        it.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert found == []
        pickle.loads(pickle.dumps(Payload))
        assert found  # the hook hears
    finally:
        looking.clear()


@pytest.mark.fault("F2")
def test_a_torch_whose_loader_is_known_to_be_unsafe_is_warned_of(tmp_path, caplog, monkeypatch):
    trainer(tmp_path, max_steps=2, **SAVING).train()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    commit.refuse_broken(tmp_path / "checkpoint-2")
    assert "torch 2.9.1 may run code" in caplog.text
    caplog.clear()
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    commit.refuse_broken(tmp_path / "checkpoint-2")
    assert not caplog.text


@pytest.mark.fault("F3")
def test_code_that_a_model_brings_does_not_run(place, tmp_path, capsys):
    model, marker = shutil.copytree(place / "model", tmp_path / "model"), tmp_path / "ran"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\n")
    assert main(words(place, tmp_path / "out", "--model_name_or_path", str(model))) == 2
    assert (
        "brings code of its own, which may do anything. Read it, then type --trust_remote_code"
        in capsys.readouterr().err
    )
    assert not marker.exists()


@pytest.mark.fault("F7")
@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", "nul\0"])
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    from test_state import Box

    box = Box()
    box.held = {name: torch.ones(2)}
    state.save_checkpoint(tmp_path / "in" / "ftplus", {"box": box.state_dict()}, tiny_llama(), step=1)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["box.safetensors", "manifest.json"]
    assert name in state.load_checkpoint(tmp_path / "in" / "ftplus", {"box": "Box()"}, tiny_llama())["box"]


CANARY = "hf_canaryCANARYcanaryCANARY"


def told(folder) -> list[Path]:
    """The files in which the canary sings."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    return [path for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.fault("F8")
@pytest.mark.parametrize("how", ["flag", "yaml", "json"])
def test_a_token_reaches_no_file_and_no_output(place, tmp_path, capsys, monkeypatch, how):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    (tmp_path / "config").mkdir()
    file = tmp_path / "config" / "run.yaml"
    file.write_text(f"model_init_kwargs: {{token: {CANARY}}}\n")
    given = {
        "flag": ["--hub_token", CANARY],
        "yaml": ["--config", str(file)],
        "json": ["--model_init_kwargs", json.dumps({"token": CANARY})],
    }
    assert main([*words(place, tmp_path / "out", "--measure_rows", "4"), *given[how]]) == 0
    assert (os.environ["HF_TOKEN"] == CANARY) == (how == "flag")  # where the Hub's library looks for it
    assert CANARY not in "".join(capsys.readouterr())
    assert told(tmp_path / "out") == []


@pytest.mark.fault("F8")
@pytest.mark.parametrize("how", ["trainer", "attach"])
def test_a_token_given_in_python_is_used_and_reaches_no_file(place, tmp_path, how):
    import trl

    cls = trl.SFTTrainer if how == "attach" else SFTTrainer
    given = {"hub_token": CANARY, "model_init_kwargs": {"token": CANARY, "revision": "main"}}
    it = trainer(tmp_path, model=str(place / "model"), cls=cls, **given, **SAVING)
    it = attach(it, "ewc", protect=PROTECT) if how == "attach" else it
    it.train()
    it.save_model()
    assert it.args.hub_token == CANARY  # to push with
    assert it.args.model_init_kwargs == {"revision": "main"}
    assert CANARY not in repr(it.args) + repr(copy.deepcopy(it.args))
    assert told(tmp_path) == []
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None
    assert saved.seed == it.args.seed


@pytest.mark.fault("F9")
def test_text_that_a_model_wrote_is_for_its_owner_alone(place, tmp_path, monkeypatch):
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    few = ["--measure_rows", "0", "--max_length", "400"]
    assert main(words(place, tmp_path / "out", *few, protect="self:4")) == 0
    texts = [path for path in tmp_path.rglob("*.jsonl") if path.parent != place]
    assert texts
    assert [path for path in texts if stat.S_IMODE(path.stat().st_mode) != 0o600] == []


@pytest.mark.fault("F10")
def test_files_that_claim_too_much_are_refused(tmp_path):
    import hashlib

    folder = shutil.copytree(HERE / "stored" / "0.1.0" / "ftplus", tmp_path / "ftplus")
    manifest = json.loads((folder / "manifest.json").read_text())
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (struct.pack("<Q", 2**60), struct.pack("<Q", len(header)) + header):
        (folder / "box.safetensors").write_bytes(content)
        manifest["files"]["box"]["sha256"] = hashlib.sha256(content).hexdigest()  # by somebody who means it
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StorageError, match="is no safetensors file"):
            state.load_checkpoint(folder, {"box": "Box()"}, tiny_llama(layers=1, hidden=8))
    for text in ("[" * 200_000, '{"a":' * 200_000, "1" * 10_000_000):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(StorageError, match="is damaged"):
            state.load_checkpoint(folder, {"box": "Box()"}, tiny_llama(layers=1, hidden=8))
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**36)  # takes no room, and would take all memory
    with pytest.raises(StorageError, match="is damaged"):
        state.load_checkpoint(folder, {"box": "Box()"}, tiny_llama(layers=1, hidden=8))
