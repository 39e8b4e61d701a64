"""`ftplus generate` and `ftplus merge`: what they answer and write, beside PEFT's own, and what they refuse."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings

import pytest
import torch
from commands import make_place, words
from hub import hub
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_ftplus.cli import main
from hf_ftplus.merged import PROBE, RoundedAwayError, merge

HONEST = LoraModel.merge_and_unload
QUICK = ["--measure_rows", "0"]
CHAT = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, an adapter that was trained on it, and a prompt-tuned one."""
    place = make_place(tmp_path_factory.mktemp("place"))
    flags = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--learning_rate", "5e-2", *QUICK]
    assert main(words(place, place / "adapter", *flags)) == 0
    return place


@pytest.fixture(scope="module")
def merged(place):
    assert main(["merge", "--model", str(place / "adapter"), "--out", str(place / "merged")]) == 0
    return place / "merged"


def answer(model, messages=CHAT, tokens=12):
    """Greedy, with transformers alone."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.eval().generate(**ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def adapted(place):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), place / "adapter")


def asked(place, tmp_path, *flags):
    """Rows that `ftplus generate` writes."""
    out = tmp_path / "answers.jsonl"
    out.unlink(missing_ok=True)
    assert main(["generate", "--out", str(out), "--max_new_tokens", "12", *map(str, flags)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_an_adapter_answers_on_its_base_as_with_peft(place, tmp_path):
    (row,) = asked(place, tmp_path, "--model", place / "adapter", "--prompt", "Name a colour.")
    assert row["completion"] == answer(adapted(place))
    assert row["model"].endswith("adapter")


def test_a_torch_that_was_built_for_cuda_does_without_a_gpu(place, tmp_path, monkeypatch):
    """It names the accelerator that it was built for, and `is_available` says that there is none."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (row,) = asked(place, tmp_path, "--model", place / "model", "--prompt", "Name a colour.")
    assert row["model"].endswith("model")
    assert main(["eval", str(place / "model"), "--measure", f"a={place / 'learn.jsonl'}", "--measure_rows", "2"]) == 0


def test_a_file_that_is_there_is_not_written_over(place, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n')
    assert main(["generate", "--model", str(place / "model"), "--file", str(file), "--out", str(file)]) == 6
    assert f"--out {file} is there already. Choose another file, or remove it." in capsys.readouterr().err
    assert file.read_text() == '{"prompt": "x"}\n'


def test_the_base_that_an_adapter_misses_is_named(place, tmp_path, capsys):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "gone"}))
    assert main(["generate", "--model", str(tmp_path / "adapter"), "--prompt", "x"]) == 3
    assert "adapter is an adapter of 'gone'. There is no folder gone" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["base", "model"])
def test_beside_its_base(place, tmp_path, capsys, other):
    other = str(place / other) if other == "model" else other
    (row,) = asked(place, tmp_path, "--model", place / "adapter", "--prompt", "Name a colour.", "--compare-with", other)
    base = answer(AutoModelForCausalLM.from_pretrained(place / "model"))
    assert row["compared"] == base != row["completion"]
    assert "1 of 1 answers differ." in capsys.readouterr().out


def test_base_of_a_whole_model_is_what_its_run_started_from(place, tmp_path):
    full = tmp_path / "full"
    assert main(words(place, full, "--learning_rate", "5e-2", *QUICK)) == 0
    (row,) = asked(place, tmp_path, "--model", full, "--prompt", "Name a colour.", "--compare-with", "base")
    assert row["compared_with"] == str(place / "model")
    assert row["compared"] == answer(AutoModelForCausalLM.from_pretrained(place / "model"))


def test_many_prompts_come_back_in_order_whatever_the_batch(place, tmp_path):
    file = tmp_path / "prompts.jsonl"
    prompts = ["Why?", "Name a fruit that grows by the sea.", "Count to five.", "x", "Who leads the workshop?"]
    file.write_text("".join(json.dumps({"prompt": text, "completion": "So."}) + "\n" for text in prompts))
    one, all_ = (
        asked(place, tmp_path, "--model", place / "adapter", "--file", file, "--batch_size", size) for size in (1, 8)
    )
    assert [row["prompt"] for row in one] == prompts
    assert one == all_
    assert {row["expected"] for row in one} == {"So."}


def test_a_conversation_in_which_somebody_waits_is_a_question(place, tmp_path):
    turns = [*CHAT, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Another."}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (turns, CHAT)))
    rows = asked(place, tmp_path, "--model", place / "adapter", "--file", tmp_path / "chats.jsonl")
    assert [row["completion"] for row in rows] == [answer(adapted(place), chat) for chat in (turns, CHAT)]
    assert [row.get("expected") for row in rows] == [None, None]


def test_text_files_stdin_and_plain_text(place, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("Why?\n\nWho?\n")
    rows = asked(place, tmp_path, "--model", place / "adapter", "--file", tmp_path / "prompts.txt")
    assert [row["prompt"] for row in rows] == ["Why?", "Who?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\nWho?\n"))
    assert asked(place, tmp_path, "--model", place / "adapter") == rows
    plain = asked(place, tmp_path, "--model", place / "adapter", "--prompt", "Why?", "--no-chat")
    assert plain[0]["completion"] != rows[0]["completion"]


def test_draws_follow_the_seed(place, tmp_path):
    flags = ["--model", place / "adapter", "--prompt", "Why?", "--temperature", "2"]
    one, again, other = (asked(place, tmp_path, *flags, "--seed", seed)[0]["completion"] for seed in (1, 1, 2))
    assert one == again != other


def test_a_checkpoint_is_compared_with_what_its_run_started_from(place, tmp_path, capsys):
    checkpoint = shutil.copytree(place / "model", tmp_path / "out" / "checkpoint-2")
    report = tmp_path / "out" / "ftplus" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"facts": {"config": {"model": {"model_name_or_path": str(place / "model")}}}}))
    flags = ["--model", checkpoint, "--prompt", "x", "--compare-with", "base"]
    (row,) = asked(place, tmp_path, *flags)
    assert row["compared_with"] == str(place / "model")
    report.write_text("{")
    assert main(["generate", *map(str, flags)]) == 3
    assert "report.json is no whole report" in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_spelt_out(place, capsys):
    prompt = "\x1b[31mred\x07 [bold]no markup[/bold]"
    assert main(["generate", "--model", str(place / "adapter"), "--prompt", prompt, "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[31mred\\x07 [bold]no markup[/bold]" in said


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "nowhere/at/all", "--prompt", "x"], 3, "No model at 'nowhere/at/all'"),
        (["--model", "{model}"], 3, "Nothing to ask. Type --prompt TEXT"),
        (["--model", "{model}", "--prompt", "  "], 3, "Prompt 1 is empty"),
        (["--model", "{model}", "--file", "missing.jsonl"], 3, "missing.jsonl does not exist"),
        (["--model", "{model}", "--prompt", "x", "--compare-with", "base"], 3, "started from is not known"),
        (["--model", "{model}", "--prompt", "x", "--top_p", "0.5"], 2, "does nothing at temperature 0"),
        (["--model", "{model}", "--prompt", "x", "--top_p", "nan"], 2, "--top_p is nan; expected more than 0"),
        (["--model", "{model}", "--prompt", "x", "--temperature", "nan"], 2, "--temperature is nan; expected 0, or"),
        (["--model", "{model}", "--prompt", "x", "--temperature", "1e-40"], 2, "--temperature is 1e-40"),
        (["--model", "{model}", "--prompt", "x", "--seed", str(2**70)], 2, "is not in the range 0<=x<=4294967295"),
        (["--model", "{model}", "--prompt", "x", "--no-chat", "--system", "Be kind."], 2, "--no-chat was given"),
        (["--model", "{model}", "--prompt", "x" * 2000], 3, "tokens, .* reads 512"),
        (["--model", "{model}", "--prompt", "x", "--max_new_tokens", "600"], 3, "lower --max_new_tokens"),
        (["--model", "{model}", "--prompt", "x", "--device", "abacus"], 3, "--device abacus"),
        (["--model", "{model}", "--prompt", "x", "--device", "cuda:99"], 3, r"--device cuda:99: .*\. Leave it out"),
    ],
)
def test_careless_commands(place, monkeypatch, capsys, flags, code, words):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["generate", *(flag.format(model=place / "model") for flag in flags)]) == code
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", " "], "Prompt 1 is empty"),
        (["--file", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--file", "{place}/odd.jsonl"], "Did you mean 'prompt'"),
        (["--file", "{place}/unasked.jsonl"], "Prompt 1 is empty; expected some text, or a turn before the"),
        (["--prompt", "x", "--no-chat", "--system", "Be kind."], "--no-chat was given"),
        ([], "Nothing to ask"),
        (["--prompt", "x", "--compare-with", "nowhere/at/all"], "No model at 'nowhere/at/all'"),
    ],
)
def test_prompts_are_looked_at_before_the_model_loads(place, monkeypatch, capsys, flags, words):
    (place / "odd.jsonl").write_text('{"promt": "Who?"}\n')
    (place / "unasked.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "I."}]}) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("hf_ftplus.trained.weights", None)  # no model may load
    flags = [flag.format(place=place) for flag in flags]
    assert main(["generate", "--model", str(place / "adapter"), *flags]) in (2, 3)
    assert words in capsys.readouterr().err.replace("\n", " ")


# ---- merge -----------------------------------------------------------------------------------------------------------


def test_merged_it_says_what_base_and_adapter_say(place, merged, tmp_path):
    with torch.no_grad():
        ids = torch.arange(20)[None]
        whole = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(whole(ids).logits, adapted(place)(ids).logits, rtol=1e-3, atol=1e-4)
    assert not (merged / "adapter_config.json").exists()
    assert "peft" not in (merged / "config.json").read_text()
    (row,) = asked(place, tmp_path, "--model", merged, "--prompt", "Name a colour.")
    assert row["completion"] == answer(adapted(place))
    assert tiny_tokenizer().chat_template in ((merged / "chat_template.jinja").read_text(),)


def test_an_adapter_of_the_hub_is_asked_and_merged_like_one_of_a_folder(place, tmp_path, monkeypatch):
    with hub(monkeypatch, tmp_path / "hub") as there:
        there.put("me/base", place / "model")
        there.put("me/adapter", place / "adapter", base="me/base")
        flags = ["--prompt", "Name a colour.", "--compare-with", "me/base"]
        (row,) = asked(place, tmp_path, "--model", "me/adapter", *flags)
        assert row["completion"] == answer(adapted(place))
        assert row["compared"] == answer(AutoModelForCausalLM.from_pretrained(place / "model"))
        assert main(["merge", "--model", "me/adapter", "--out", str(tmp_path / "out")]) == 0
    ids = torch.arange(20)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(whole(ids).logits, adapted(place)(ids).logits, rtol=1e-3, atol=1e-4)


def test_an_adapter_stays_on_the_revision_that_it_was_trained_on(place, tmp_path, monkeypatch):
    other = tmp_path / "other"
    tiny_llama(seed=9).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    of_hub = ["--model_name_or_path", "me/base", "--model_revision", "v2"]
    with hub(monkeypatch, tmp_path / "hub") as there:
        there.put("me/base", other)
        there.put("me/base@v2", place / "model")
        adapter, whole = tmp_path / "adapter", tmp_path / "whole"
        lora = ["--use_peft", "true", "--lora_target_modules", "q_proj"]
        assert main(words(place, adapter, *QUICK, *lora, *of_hub)) == 0
        assert main(["merge", "--model", str(adapter), "--out", str(tmp_path / "out")]) == 0
        found, base = (
            AutoModelForCausalLM.from_pretrained(it).state_dict() for it in (tmp_path / "out", place / "model")
        )
        assert {name for name in base if not torch.equal(found[name], base[name])} == {
            name for name in base if "q_proj" in name
        }
        assert main(words(place, whole, *QUICK, *of_hub)) == 0
        (row,) = asked(place, tmp_path, "--model", whole, "--prompt", "Name a colour.", "--compare-with", "base")
        assert row["compared"] == answer(AutoModelForCausalLM.from_pretrained(place / "model"))


def test_a_folder_has_no_revision(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["generate", "--model", "model@v2", "--prompt", "x"]) == 3
    assert "model is a folder, which has no revisions. Leave @v2 out" in capsys.readouterr().err


def dropped(model, **options):
    return model.unload()


def one_weight_left_out(model, **options):
    next(module for module in model.modules() if isinstance(module, LoraLayer)).lora_B["default"].weight.data.zero_()
    return HONEST(model, **options)


def twice(model, **options):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {key: 2 * value for key, value in module.scaling.items()}
    return HONEST(model, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wrong", [dropped, one_weight_left_out, twice])
def test_no_merge_that_says_something_else_is_written(place, monkeypatch, tmp_path, capsys, wrong, dtype):
    line = ["merge", "--model", str(place / "adapter"), "--out", str(tmp_path / "out"), "--dtype", dtype]
    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    assert main(line) == 4
    assert "differs from base and adapter by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(line) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "lora_bias": False, "init_lora_weights": True},  # it does nothing at all
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_honest_merge_is_written_as_it_was(place, tmp_path, more, dtype):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **{"init_lora_weights": False, **more}))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert main(["merge", "--model", str(tmp_path / "adapter"), "--out", str(out), "--dtype", dtype]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        there = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), tmp_path / "adapter")(
            ids
        )
    near = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(there, here.logits, rtol=near, atol=near * here.logits.abs().max().item())


def without_a_layer(model):
    return {name: weight for name, weight in model.state_dict().items() if "layers.1" not in name}


def without_the_tie(model):
    model.config.tie_word_embeddings = False
    return {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lossy", [without_a_layer, without_the_tie])
@pytest.mark.parametrize("there", [False, True])
def test_a_model_that_is_read_back_otherwise_does_not_stay(place, monkeypatch, tmp_path, capsys, lossy, there, dtype):
    out, honest = tmp_path / "out", PreTrainedModel.save_pretrained
    if there:
        out.mkdir()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda it, to: honest(it, to, state_dict=lossy(it)))
    assert main(["merge", "--model", str(place / "adapter"), "--out", str(out), "--dtype", dtype]) == 4
    assert "are read back from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == ([out] if there else [])
    assert not there or not list(out.iterdir())


def saved_modules_dropped(model, **options):
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].weight.data.copy_(module.original_module.weight.data)
    return HONEST(model, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_of_the_last_tokens_alone_are_not_lost(tmp_path, monkeypatch, capsys, dtype):
    base = tiny_llama(tie=False)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[-1].add_(1)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    line = ["merge", "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--dtype", dtype]
    monkeypatch.setattr(LoraModel, "merge_and_unload", saved_modules_dropped)
    assert main(line) == 4
    assert "differs from base and adapter by" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(line) == 0


def test_tokens_that_were_added_for_an_adapter_stay(place, tmp_path):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(place / "model"), tiny_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert main(["merge", "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    ids = torch.arange(len(tokenizer) - 20, len(tokenizer))[None]
    with torch.no_grad():
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        torch.testing.assert_close(there, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", b"{nope", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "names no base_model_name_or_path"),
        ("adapter_config.json", b'{"base_model_name_or_path": "bad"}', "names its own folder as its base"),
        ("adapter_model.safetensors", b"abc", "cannot be loaded: Error while deserializing"),
        ("adapter_model.safetensors", None, "but no adapter_model.safetensors"),
    ],
)
def test_damaged_adapters(place, tmp_path, monkeypatch, capsys, name, content, words):
    shutil.copytree(place / "adapter", tmp_path / "bad")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad" / name).unlink() if content is None else (tmp_path / "bad" / name).write_bytes(content)
    for line in (["generate", "--prompt", "x"], ["merge", "--out", str(tmp_path / "out")]):
        assert main([*line, "--model", str(tmp_path / "bad")]) == 3
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", "out", "--prompt", "x"]) == 3
    assert "There is no folder out, nor could a model of this name be had from the Hub." in capsys.readouterr().err


def test_an_adapter_on_a_base_of_another_width(place, tmp_path, capsys):
    shutil.copytree(place / "adapter", tmp_path / "other")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "wide")
    file = tmp_path / "other" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "wide")}
    file.write_text(json.dumps(config))
    assert main(["generate", "--model", str(tmp_path / "other"), "--prompt", "x"]) == 3
    assert "cannot be loaded" in capsys.readouterr().err


def test_chats_for_a_model_without_a_template(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "plain")
    tiny_tokenizer(None).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    line = ["generate", "--model", str(tmp_path / "plain"), "--file", str(tmp_path / "chats.jsonl")]
    assert main(line) == 3
    assert f"Prompt 1 is a chat, and {tmp_path / 'plain'} has no chat template" in capsys.readouterr().err
    beside = ["generate", "--model", str(place / "model"), "--compare-with", str(tmp_path / "plain")]
    assert main([*beside, "--file", str(tmp_path / "chats.jsonl")]) == 3
    assert f"Prompt 1 is a chat, and {tmp_path / 'plain'} has no chat template" in capsys.readouterr().err


def test_each_of_two_models_is_asked_in_its_own_form(place, tmp_path, capsys):
    """A base model and what was trained of it with a chat template, in either order."""
    shutil.copytree(place / "model", tmp_path / "untaught")
    tiny_tokenizer(None).save_pretrained(tmp_path / "untaught")
    (tmp_path / "untaught" / "chat_template.jinja").unlink()
    alone = {
        name: asked(place, tmp_path, "--model", name, "--prompt", "Name a colour.")[0]["completion"]
        for name in (place / "model", tmp_path / "untaught")
    }
    assert len(set(alone.values())) == 2
    for one, other in (list(alone), list(alone)[::-1]):
        (row,) = asked(place, tmp_path, "--model", one, "--compare-with", other, "--prompt", "Name a colour.")
        assert (row["completion"], row["compared"]) == (alone[one], alone[other])
        assert "untaught has no chat template: it reads each prompt as text" in capsys.readouterr().err


def test_a_system_message_comes_before_every_kind_of_chat(place, tmp_path):
    chats = [CHAT, [*CHAT, {"role": "assistant", "content": "Red."}]]
    for number, chat in enumerate(chats):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
        file = ["--file", tmp_path / f"{number}.jsonl", "--system", "Be kind."]
        (row,) = asked(place, tmp_path, "--model", place / "adapter", *file)
        assert row["completion"] == answer(adapted(place), [{"role": "system", "content": "Be kind."}, *CHAT])


def test_out_is_looked_at_before_anything_is_asked(place, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "answers.jsonl"
    assert main(["generate", "--model", "nowhere/at/all", "--prompt", "x", "--out", str(out)]) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_an_adapter_that_rounding_would_swallow_is_not_merged_into_few_bits(place, tmp_path, capsys):
    shutil.copytree(place / "adapter", tmp_path / "weak")
    file = tmp_path / "weak" / "adapter_model.safetensors"
    save_file({name: weight * 1e-3 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    line = ["merge", "--model", str(tmp_path / "weak"), "--out", str(tmp_path / "out")]
    assert main([*line, "--dtype", "bfloat16"]) == 4
    assert "Type --dtype float32" in capsys.readouterr().err
    assert main([*line, "--dtype", "float32"]) == 0
    assert "rounding the merged weights by 0: 0.0% of that" in capsys.readouterr().out


def test_what_is_lost_is_what_rounding_the_weights_does(place, tmp_path):
    """Not what few bits do to the forward pass, of which the adapter is as innocent as the merge."""
    done = merge(str(place / "adapter"), tmp_path / "out", "bfloat16", "cpu")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    exact = PeftModel.from_pretrained(base, place / "adapter").eval()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.linspace(0, base.config.vocab_size - 1, PROBE).long()[None]
    with torch.no_grad():
        apart = (exact(ids).logits - rounded(ids).logits).abs().max().item()
        with exact.disable_adapter():
            moved = (exact(ids).logits - rounded(ids).logits).abs().max().item()
    assert done.rounded == pytest.approx(apart, rel=1e-2)
    assert done.moved == pytest.approx(moved, rel=0.2)
    assert done.lost == done.rounded / done.moved
    with pytest.raises(RoundedAwayError, match="Type --dtype float32"):
        merge(str(place / "adapter"), tmp_path / "less", "bfloat16", "cpu", tolerance=done.lost)


def test_memory_of_the_run_knows_the_merged_model(place, merged, tmp_path):
    memory = ["--memory", str(place / "adapter" / "ftplus" / "memory")]
    lora = ["--use_peft", "true", "--lora_target_modules", "all-linear", *QUICK]
    assert main(words(place, tmp_path / "other", *memory, *lora)) == 4  # the base is another model
    again = tmp_path / "again"
    shutil.copytree(merged, again / "model")
    for name in ("learn", "protect"):
        shutil.copy(place / f"{name}.jsonl", again)
    assert main(words(again, tmp_path / "next", *memory, *lora)) == 0


@pytest.mark.parametrize(
    ("model", "out", "code", "words"),
    [
        ("model", "new", 2, "holds no adapter"),
        ("adapter", "model", 6, "is not an empty folder"),
        ("nowhere/at/all", "new", 3, "No model at"),
    ],
)
def test_careless_merges(place, capsys, model, out, code, words):
    name = model if "/" in model else str(place / model)
    assert main(["merge", "--model", name, "--out", str(place / out)]) == code
    assert words in capsys.readouterr().err
    assert not (place / "new").exists()


def test_an_adapter_that_cannot_be_merged(place, tmp_path, capsys):
    from peft import PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(place / "model")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    tiny_tokenizer().save_pretrained(tmp_path / "prompt")
    assert main(["merge", "--model", str(tmp_path / "prompt"), "--out", str(tmp_path / "new")]) == 4
    assert "PROMPT_TUNING) cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_the_stack_tells_its_developers_reaches_no_user(place, tmp_path):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert main(["merge", "--model", str(place / "adapter"), "--out", str(tmp_path / "merged")]) == 0
        assert main(words(place, tmp_path / "adapter", "--use_peft", "true", "--max_steps", "1", *QUICK)) == 0
    assert not [warning for warning in heard if "gradient_checkpointing` is deprecated" in str(warning.message)]


@pytest.mark.parametrize("size", [1, 2])
def test_one_prompt_given_several_times_is_answered_in_several_ways(place, tmp_path, size):
    flags = [flag for _ in range(6) for flag in ("--prompt", "Why?")]
    rows = asked(place, tmp_path, "--model", place / "adapter", *flags, "--temperature", "2", "--batch_size", size)
    assert len({row["completion"] for row in rows}) > 4


def test_merged_weights_are_rounded_once(place, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    assert main(["merge", "--model", str(tmp_path / "adapter"), "--out", str(out), "--dtype", "bfloat16"]) == 0
    wanted = model.merge_and_unload().to(torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
