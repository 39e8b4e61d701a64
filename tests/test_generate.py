"""Claims about self-generated text: a model writes chats or text, repeatably, and nothing else notices."""

from __future__ import annotations

import itertools
import json
import random
import re
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace

import numpy
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, TopPLogitsWarper

from hf_ftplus import generate
from hf_ftplus.errors import DataError, UsageError
from hf_ftplus.examples import tokenize
from hf_ftplus.fingerprint import fingerprint
from hf_ftplus.generate import open_user_turn, self_generate

SHORT = {"batch_size": 4, "max_new_tokens": 12, "request_tokens": 8, "progress": False}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_start|>\n\n{{ m['content'] | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"


def rows_of(dataset) -> list[dict]:
    return list(dataset)


def parrot(text: str):
    """A Llama that can only say `text` (tokens that all differ) and then end its turn, whatever came before."""
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    model = tiny_llama(hidden=512, layers=1, vocab=512, tie=False)
    with torch.no_grad():
        for weight in model.model.layers[0].parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(512))
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[0]] = 10  # after any token but those below
        for token, following in pairwise(ids):
            model.lm_head.weight[following, token] = 100
    return model


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_outside_a_terminal_one_line_says_how_long_it_will_take_and_changes_no_row(caplog):
    caplog.set_level("INFO", "hf_ftplus")
    said = self_generate(tiny_llama(), tiny_tokenizer(), 6, **SHORT | {"progress": True})
    (line,) = [item.getMessage() for item in caplog.records]
    assert re.fullmatch(r"writing 6 rows with the starting model, about \d+ s", line)
    assert rows_of(said) == rows_of(self_generate(tiny_llama(), tiny_tokenizer(), 6, **SHORT))
    assert len(caplog.records) == 1


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", [tiny_tokenizer().chat_template, SYSTEM + tiny_tokenizer().chat_template, LLAMA3, INST]
)
def test_a_chat_model_writes_that_many_chats(template, model):
    tokenizer = tiny_tokenizer(template)
    rows = rows_of(self_generate(model, tokenizer, 6, seed=0, **SHORT))
    assert len(rows) == 6
    for row in rows:
        assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert all(m["content"].strip() for m in row["prompt"] + row["completion"])
        assert "<|im_" not in json.dumps(row)
    assert len({row["prompt"][0]["content"] for row in rows}) == 6, "no request comes twice"
    assert tokenize(rows, tokenizer, 256, "self").dropped == 0


def test_a_base_model_writes_text(model):
    tokenizer = tiny_tokenizer(chat_template=None)
    rows = rows_of(self_generate(model, tokenizer, 5, seed=0, **SHORT))
    assert [list(row) for row in rows] == [["text"]] * 5
    assert tokenize(rows, tokenizer, 256, "self").dropped == 0


def test_a_model_that_reads_little_writes_as_much_as_it_can():
    """Learned positions end where they end: one token more is an error deep inside the model."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16, **ends)
    model = GPT2LMHeadModel(config)
    assert len(self_generate(model, tokenizer, 3, batch_size=4, progress=False)) == 3
    chatty = tiny_tokenizer()
    chatty.chat_template = (
        "{{ bos_token }}" + "one two three " * 8 + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"reads 16 tokens, and what it is to answer has \d+ already.*--protect FILE"):
        self_generate(model, chatty, 3, batch_size=4, progress=False)


def test_the_template_is_opened_where_the_users_words_begin():
    assert open_user_turn(tiny_tokenizer()) == ("<|im_start|>user\n", "<|im_end|>")
    header, _ = open_user_turn(tiny_tokenizer(SYSTEM + tiny_tokenizer().chat_template))
    assert header == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert open_user_turn(tiny_tokenizer(LLAMA3)) == ("<|endoftext|><|im_start|>user<|im_start|>\n\n", "<|im_end|>")
    assert open_user_turn(tiny_tokenizer(INST)) == ("<|endoftext|>[INST] ", "[/INST]")
    with pytest.raises(DataError, match=r"does not show the user's words.*--protect FILE"):
        open_user_turn(tiny_tokenizer("hello"))


def test_the_model_says_what_it_says_and_stops_where_it_stops():
    row = rows_of(self_generate(parrot("The dog"), tiny_tokenizer(), 1, seed=0, **SHORT))[0]
    assert row["prompt"][0]["content"] == "The dog"
    assert row["completion"][0]["content"] == "The dog"


def test_a_turn_that_ends_in_plain_text_is_cut_there():
    rows = rows_of(
        self_generate(parrot("Why[/INST] dog"), tiny_tokenizer(INST), 1, seed=0, **(SHORT | {"request_tokens": 40}))
    )
    assert rows[0]["prompt"][0]["content"] == "Why"


def test_an_answer_that_ran_out_of_tokens_ends_with_its_last_whole_sentence():
    assert generate._whole_sentences("It is late. Go home! The last bo") == "It is late. Go home!"
    assert generate._whole_sentences("Pi is 3.14 or so") == "Pi is 3.14 or so", "nothing to cut at: kept whole"


def test_nothing_signs_and_loops_are_not_kept():
    for bad in ("", " \n", "?!", "ha " * 40):
        assert not generate._says_something(bad)
    for good in ("No.", "42", "不", "ha ha ha", "one two three four five six seven eight nine ten"):
        assert generate._says_something(good)


@pytest.mark.parametrize("text", ["", "?!"])
def test_a_model_with_nothing_to_say_is_an_error_after_bounded_tries(text):
    with pytest.raises(DataError, match=r"only 0 usable rows of 3 in 32 tries.*--protect FILE"):
        self_generate(parrot(text), tiny_tokenizer(), 3, seed=0, **SHORT)


def test_a_model_that_repeats_itself_is_an_error():
    with pytest.raises(DataError, match="only 1 usable rows of 3"):
        self_generate(parrot("The dog"), tiny_tokenizer(), 3, seed=0, **SHORT)


def test_a_model_that_mostly_repeats_itself_is_asked_for_more_to_the_last_row(tokenizer):
    """One row in six is new: asked for no more than is missing, it would run out of tries near the end."""
    said = (f"Boat {i // 6} sails." for i in itertools.count())
    rows = generate._rows(
        lambda openings, *_: list(itertools.islice(said, len(openings))), tiny_tokenizer(None), 120,
        generate.Sampling(batch_size=64), generate._bar(120, False),
    )  # fmt: skip
    assert [row["text"] for row in rows] == [f"Boat {i} sails." for i in range(120)]


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"temperature": float("nan")}]
)
def test_a_setting_out_of_range_is_refused_by_name(bad, model, tokenizer):
    with pytest.raises(UsageError, match=f"{next(iter(bad))} is .*; expected above 0"):
        self_generate(model, tokenizer, 3, **(SHORT | bad))


# ---- repeatable, and without a trace -------------------------------------------------------------------------------


def test_the_seed_alone_decides(model, tokenizer):
    first = rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT))
    torch.manual_seed(99)
    model.train()
    assert rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT)) == first
    assert rows_of(self_generate(model, tokenizer, 5, seed=2, **SHORT)) != first


def test_a_checkpoints_own_generation_settings_do_not_count(model, tokenizer):
    first = rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT))
    model.generation_config.update(top_k=1, repetition_penalty=9.0, do_sample=False, max_length=3, min_p=0.5)
    assert rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT)) == first


def test_temperature_one_and_top_p_one_sample_the_models_own_distribution():
    """First words of many texts against the exact probabilities."""
    model, tokenizer = tiny_llama(tie=False), tiny_tokenizer(chat_template=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # an opinionated head
        exact = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].softmax(-1)
    said = [tokenizer.decode([i]).strip() for i in range(len(exact))]
    words = sorted({word for word in said if word.isalpha()})
    exact = torch.tensor([sum(float(exact[i]) for i, other in enumerate(said) if other == word) for word in words])

    def error(top_p: float) -> float:
        with generate._sampler(model, tokenizer, 0, generate.Sampling(top_p=top_p)) as write:
            texts = write([tokenizer.bos_token] * 10_000, 1, "")
        assert len(set(texts)) > 100 or top_p < 1, "some words were never on offer"
        return float((torch.tensor([texts.count(word) for word in words]) / len(texts) - exact).abs().max())

    assert exact.max() > 0.03, "a flat model would show nothing"
    assert error(1.0) < 0.01
    assert error(0.5) > 0.02, "and the comparison sees a cut tail"


@pytest.mark.parametrize("candidates", [4, 1024])
def test_the_nucleus_is_transformers_own(monkeypatch, candidates):
    """The same tokens are possible, in the same proportions, also where the nucleus is wider than the candidates."""
    monkeypatch.setattr(generate, "CANDIDATES", candidates)
    scores = torch.stack([3 * torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.zeros(50)])
    exact = TopPLogitsWarper(0.8)(None, scores / 0.7).softmax(-1)
    torch.manual_seed(0)
    drawn = generate.Nucleus(0.7, 0.8)(None, scores.repeat(20_000, 1)).softmax(-1).view(-1, 2, 50).mean(0)
    assert torch.equal(drawn[0] > 0, exact[0] > 0)
    assert (drawn[0] - exact[0]).abs().max() < 0.02
    assert (drawn[1] > 0).sum() == (exact[1] > 0).sum() == 40  # ties: any 40 of 50 equals will do


def test_everything_is_left_as_found(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    settings, weights = deepcopy(model.generation_config.to_dict()), fingerprint(model)
    modes = [module.training for module in model.modules()]
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    python, array, cpu = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()

    self_generate(model, tokenizer, 5, seed=1, **SHORT)

    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == array).all()
    assert torch.equal(torch.get_rng_state(), cpu)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert fingerprint(model) == weights
    assert tokenizer.padding_side == tiny_tokenizer().padding_side
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_everything_is_left_as_found_after_an_error(tokenizer):
    model = parrot("?!").train()
    settings, cpu = model.generation_config, torch.get_rng_state()
    with pytest.raises(DataError):
        self_generate(model, tokenizer, 3, seed=0, **SHORT)
    assert model.training
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), cpu)


def test_padding_on_the_left_changes_no_word(model, tokenizer):
    """Greedy, so that batches can be compared: a short opening beside a long one says what it says alone."""
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)  # so that what is attended to matters
    how = generate.Sampling(temperature=1e-4)
    openings = ["<|im_start|>user\nWhy?", "<|im_start|>user\nTell me a short story about a dog who slept by the door."]
    with generate._sampler(model, tokenizer, 0, how) as write:
        together = write(openings, 8, "")
        alone = [write([opening], 8, "")[0] for opening in openings]
    assert together == alone


def test_a_fresh_adapter_writes_what_its_base_writes_and_a_trained_one_does_not(tokenizer):
    from peft import LoraConfig, get_peft_model

    base = rows_of(self_generate(tiny_llama(), tokenizer, 5, seed=1, **SHORT))
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"))
    settings = adapted.get_base_model().generation_config
    assert rows_of(self_generate(adapted, tokenizer, 5, seed=1, **SHORT)) == base
    assert adapted.get_base_model().generation_config is settings
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    assert rows_of(self_generate(adapted, tokenizer, 5, seed=1, **SHORT)) != base


@pytest.mark.gpu
def test_on_an_accelerator_its_generator_is_left_as_found(tokenizer):
    """Would prove that sampling on a GPU is seeded by us and moves no generator of CPU or GPU."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        pytest.skip("no accelerator")
    module, model = torch.get_device_module(device), tiny_llama().to(device)
    module.manual_seed(7)
    before, cpu = module.get_rng_state(), torch.get_rng_state()
    first = rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT))
    assert torch.equal(module.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), cpu)
    module.manual_seed(8)
    assert rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT)) == first
    assert fingerprint(model) == fingerprint(model.cpu())


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_torch_2_6_has_what_seeds_one_device_and_gives_it_back(kind, monkeypatch):
    """`torch.accelerator.device_index` came with 2.8; Apple's module has no devices to choose from."""
    done = []

    @contextmanager
    def chosen(device):
        done.append(f"on {device}")
        yield
        done.append(f"off {device}")

    module = SimpleNamespace(
        get_rng_state=lambda: "state",
        manual_seed=lambda seed: done.append(f"seeded {seed}"),
        set_rng_state=lambda state: done.append(f"{state} is back"),
        **({"device": chosen} if kind == "cuda" else {}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.delattr(torch.accelerator, "device_index", raising=False)
    with generate.private_rng(torch.device(kind, 1 if kind == "cuda" else 0), 7):
        done.append("drawn")
    inside = ["seeded 7", "drawn", "state is back"]
    assert done == (["on cuda:1", *inside, "off cuda:1"] if kind == "cuda" else inside)


# ---- the cache -----------------------------------------------------------------------------------------------------


def forbidden(*_args, **_options):
    raise AssertionError("generated although the rows were cached")


def test_the_second_time_nothing_is_generated(model, tokenizer, tmp_path, monkeypatch):
    first = self_generate(model, tokenizer, 5, seed=1, cache=tmp_path / "new", **SHORT)
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".jsonl"]
    monkeypatch.setattr(type(model), "generate", forbidden)
    again = self_generate(model, tokenizer, 5, seed=1, cache=tmp_path / "new", **SHORT)
    assert rows_of(again) == rows_of(first)


def test_another_model_template_seed_or_setting_is_another_file(model, tokenizer, tmp_path):
    moved = tiny_llama()
    with torch.no_grad():
        moved.model.norm.weight[0].add_(1e-3)
    turned = deepcopy(model)  # the same weights, and positions that turn otherwise
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 100.0}
    renamed = deepcopy(model)
    renamed.config._name_or_path = "elsewhere"
    runs = [
        (model, tokenizer, 5, {"seed": 1}),
        (moved, tokenizer, 5, {"seed": 1}),
        (turned, tokenizer, 5, {"seed": 1}),
        (model, tiny_tokenizer(LLAMA3), 5, {"seed": 1}),
        (model, tokenizer, 4, {"seed": 1}),
        (model, tokenizer, 5, {"seed": 2}),
        (model, tokenizer, 5, {"seed": 1, "top_p": 0.9}),
    ]
    for one, words, count, how in runs:
        self_generate(one, words, count, cache=tmp_path, **(SHORT | how))
    self_generate(renamed, tokenizer, 5, cache=tmp_path, **SHORT, seed=1)  # as the first
    assert len(list(tmp_path.iterdir())) == len(runs)


def test_a_damaged_cache_is_written_anew(model, tokenizer, tmp_path):
    first = rows_of(self_generate(model, tokenizer, 5, seed=1, cache=tmp_path, **SHORT))
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    for damage in (whole[:-20], b"", whole.splitlines(keepends=True)[0]):
        file.write_bytes(damage)
        assert rows_of(self_generate(model, tokenizer, 5, seed=1, cache=tmp_path, **SHORT)) == first
        assert file.read_bytes() == whole


def test_rows_are_not_lost_where_no_cache_can_be_kept(model, tokenizer, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    rows = rows_of(self_generate(model, tokenizer, 5, seed=1, cache=tmp_path / "cache" / "self", **SHORT))
    assert rows == rows_of(self_generate(model, tokenizer, 5, seed=1, **SHORT))
    assert "unless FTPLUS_CACHE names a better folder" in caplog.text


def test_a_run_killed_while_writing_leaves_no_file(model, tokenizer, tmp_path, monkeypatch):
    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        self_generate(model, tokenizer, 5, seed=1, cache=tmp_path, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_no_bar_where_nobody_watches(model, tokenizer, capfd):
    self_generate(model, tokenizer, 2, seed=0, **(SHORT | {"progress": True}))
    assert "self-generated" not in capfd.readouterr().err
