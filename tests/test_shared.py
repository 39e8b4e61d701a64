"""A memory that is given away: made once, on the Hub and back, verified, and used without the data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from commands import make_place, words
from hub import hub
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from training import trainer
from transformers import AutoModelForCausalLM

from hf_ftplus import state
from hf_ftplus.cli import main
from hf_ftplus.errors import IncompatibleError, StorageError
from hf_ftplus.shared import base
from hf_ftplus.shared.base import Base, content_hash
from hf_ftplus.shared.hub import card, refusal, verify


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


def make(place, out, *more):
    protect = f"chat={place / 'protect.jsonl'}"
    return main(["memory", "make", "--model", str(place / "model"), "--protect", protect, "--out", str(out), *more])


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "memory"
    assert make(place, folder) == 0
    return folder


def penalty(out):
    history = json.loads((out / "ftplus" / "report.json").read_text())["facts"]["history"]
    return [entry["ewc/penalty"] for entry in history if "ewc/penalty" in entry]


def test_full_importances_are_kept_in_two_bytes_a_weight(made):
    found = {k: v for k, v in load_file(made / "ewc.safetensors").items() if not k.startswith(state.SKETCH)}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in found.values()) == sum(w.numel() for w in tiny_llama().parameters())
    about = json.loads((made / "base.json").read_text())
    assert about["protect"][0].startswith("chat=")
    assert about["protect"][0].endswith(", 16 rows")
    assert about["dtypes"] == ["F32"]


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "--lora_r", "2"]], ids=["full", "lora"])
def test_it_protects_without_the_data_all_weights_and_adapters_alike(place, made, tmp_path, adapter):
    line = words(place, tmp_path / "out", "--memory", str(made), "--logging_steps", "2", *adapter, protect=None)
    assert main(line) == 0
    assert penalty(tmp_path / "out")[-1] > 0


def test_for_adapters_alone_it_is_small_and_fits_any_of_them(place, made, tmp_path):
    assert make(place, tmp_path / "memory", "--for", "lora") == 0
    size = (tmp_path / "memory" / "ewc.safetensors").stat().st_size
    assert size < (made / "ewc.safetensors").stat().st_size
    few = ["--use_peft", "--lora_target_modules", "q_proj", "--logging_steps", "2"]
    assert main(words(place, tmp_path / "out", "--memory", str(tmp_path / "memory"), *few, protect=None)) == 0
    assert penalty(tmp_path / "out")[-1] > 0


def test_another_model_is_refused_by_the_content_of_its_weights(place, made, tmp_path, capsys):
    other = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][5, 5] += 1e-3  # one weight of many: no sample of them would show it
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    line = words(place, tmp_path / "out", "--memory", str(made), protect=None)
    line[line.index("--model_name_or_path") + 1] = str(other)
    assert main(line) == 4
    said = capsys.readouterr().err
    assert f"was made on {place / 'model'}" in said
    assert "ftplus memory make" in said
    assert not (tmp_path / "out").exists()
    script = trainer(
        tmp_path / "script", "ewc", protect=None, model=AutoModelForCausalLM.from_pretrained(other), memory=made
    )
    with pytest.raises(IncompatibleError, match=f"was made on {place / 'model'}.* {other} has other weights"):
        script.train()


def test_the_hash_is_of_the_content_however_it_is_stored(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert content_hash(str(tmp_path / "parts")) == content_hash(str(place / "model"))
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert content_hash(str(tmp_path / "half"))[1] == ("BF16",)


def test_the_hash_of_a_name_is_that_of_its_revision(place, made, tmp_path, monkeypatch):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with hub(monkeypatch, tmp_path / "cache") as there:
        there.put("you/model", tmp_path / "other")
        there.put("you/model@v2", place / "model")
        assert content_hash("you/model@v2") == content_hash(str(place / "model"))
        base.check(made, "you/model@v2")
        with pytest.raises(IncompatibleError, match=r"you/model has other weights"):
            base.check(made, "you/model")
    line = words(place, tmp_path / "out", "--memory", str(made), "--model_revision", "v2", protect=None)
    asked = []
    monkeypatch.setattr(base, "check", lambda folder, model: asked.append(model) or sys.exit(0))
    line[line.index("--model_name_or_path") + 1] = "you/model"
    with pytest.raises(SystemExit):
        main(line)
    assert asked == ["you/model@v2"]


def test_a_pushed_run_says_which_weights_its_memory_is_of_and_what_goes_along(place, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(words(place, out, "--push_to_hub", "--hub_model_id", "me/model")) == 0
        assert "ftplus/memory/base.json" in there.repos["me/model"]
        assert "goes to me/model, too: a report with 3 rows of each task and the answers" in caplog.text
        assert main(["memory", "pull", "me/model", "--out", str(tmp_path / "back")]) == 0
    about = base.read(tmp_path / "back")
    assert (about.name, about.sha256) == ("me/model", content_hash(str(out))[0])


def test_the_same_model_in_another_precision_is_taken(place, made, tmp_path):
    AutoModelForCausalLM.from_pretrained(place / "model").bfloat16().save_pretrained(tmp_path / "half")
    base.check(made, str(tmp_path / "half"))


def test_it_goes_to_the_hub_with_a_card_and_comes_back_verified(place, made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "memory")
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", str(folder), "me/velmora", "--base", "me/model"]) == 0
        assert capsys.readouterr().out.strip() == "https://huggingface.co/me/velmora"
        files = there.repos["me/velmora"]
        assert files.keys() == {"manifest.json", "base.json", "ewc.safetensors", "README.md"}
        text = files["README.md"].decode()
        assert content_hash(str(place / "model"))[0] in text
        assert "ftplus memory pull me/velmora" in text
        assert main(["memory", "pull", "me/velmora", "--out", str(tmp_path / "back")]) == 0
        assert "--model_name_or_path me/model" in capsys.readouterr().out
    assert verify(tmp_path / "back") == verify(made)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cache", "memory"]


def test_a_memory_of_a_folder_is_pushed_under_the_name_that_others_know(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "memory")
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", str(folder), "me/velmora"]) == 2
        assert "is no name by which others get the model of" in capsys.readouterr().err
        assert main(["memory", "push", str(folder), "me/velmora", "--base", "demo"]) == 2
        assert there.repos == {}
        (tmp_path / "me" / "model").mkdir(parents=True)  # as `hf download --local-dir me/model` has it
        monkeypatch.chdir(tmp_path)
        assert main(["memory", "push", str(folder), "me/velmora", "--base", "me/model"]) == 0
        about = json.loads(there.repos["me/velmora"]["base.json"])
    assert about == json.loads((made / "base.json").read_text()) | {"name": "me/model"}


def test_what_arrives_damaged_is_not_kept(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "memory")
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", str(folder), "me/velmora", "--base", "me/model"]) == 0
        content = there.repos["me/velmora"]["ewc.safetensors"]
        there.repos["me/velmora"]["ewc.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
        assert main(["memory", "pull", "me/velmora", "--out", str(tmp_path / "back")]) == 6
    assert "sha256 differs" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_what_a_run_left_is_published_and_found_beside_its_model(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(words(place, out)) == 0
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", str(out / "ftplus" / "memory"), "me/left"]) == 2
        assert "Type --base OWNER/NAME" in capsys.readouterr().err
        assert main(["memory", "push", str(out / "ftplus" / "memory"), "me/left", "--base", "me/model"]) == 0
        assert content_hash(str(out))[0] in there.repos["me/left"]["README.md"].decode()
        assert main(["memory", "push", str(out / "ftplus" / "memory"), "me/left", "--base", "me/renamed"]) == 0
        assert "me/renamed" in there.repos["me/left"]["README.md"].decode()
        memory = there.repos["me/left"]
        there.repos["me/model"] = {
            f"ftplus/memory/{name}": memory[name] for name in ("manifest.json", "ewc.safetensors")
        }
        there.repos["me/model"] |= {"model.safetensors": b"large", "README.md": b"of the model"}
        assert main(["memory", "pull", "me/model", "--out", str(tmp_path / "back")]) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "base.json",
        "ewc.safetensors",
        "manifest.json",
    ]
    line = words(place, tmp_path / "next", "--memory", str(tmp_path / "back"), protect=None)
    line[line.index("--model_name_or_path") + 1] = str(out)
    assert main(line) == 0


def test_nothing_of_the_users_disk_is_published(place, made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "memory")
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", str(folder), "me/velmora", "--base", "me/model"]) == 0
        files = there.repos["me/velmora"]
    assert "| protects | chat=protect.jsonl, 16 rows |" in files["README.md"].decode()
    assert not any(str(place).encode() in content for content in files.values())


def test_what_the_hub_says_against_a_card_is_shown(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made, tmp_path / "memory")
    monkeypatch.setattr("hf_ftplus.shared.hub.refuse_local", lambda *_, **__: None)
    with hub(monkeypatch, tmp_path / "cache"):
        assert main(["memory", "push", str(folder), "me/velmora"]) == 6
        assert '"base_model" must be the name of a model on the Hub' in capsys.readouterr().err


def test_what_the_hub_says_against_a_request_is_shown():
    import huggingface_hub.errors

    response = type("Response", (), {"status_code": 400, "headers": {}, "request": None})()
    error = huggingface_hub.errors.BadRequestError("no", response=response, server_message="Too\n long")
    assert refusal("me/x", error) == "The Hub refused me/x (BadRequestError, 400): Too long"


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_line_of_the_card_and_that_of_pull_work_as_they_stand(place, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "model", tmp_path / "me" / "model")  # where the Hub's name leads, for the run
    assert make(place, "made", "--for", form) == 0
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["memory", "push", "made", "me/velmora", "--base", "me/model"]) == 0
        card = there.repos["me/velmora"]["README.md"].decode()
        pull, train = re.findall(r"^\$ ftplus (.*)", card, re.M)
        capsys.readouterr()
        assert main(shlex.split(pull)) == 0
    assert f"Train with it: ftplus {train}" in capsys.readouterr().out
    line = shlex.split(train.replace("YOUR_DATA", str(place / "learn.jsonl")))
    few = ["--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--gradient_checkpointing", "false"]
    assert main([*line, *few, "--learning_rate", "1e-3", "--output_dir", "out"]) == 0
    assert penalty(tmp_path / "out")[-1] > 0


def test_a_memory_for_adapters_is_refused_where_all_weights_are_trained_also_in_a_dry_run(place, tmp_path, capsys):
    assert make(place, tmp_path / "memory", "--for", "lora") == 0
    line = words(place, tmp_path / "out", "--memory", str(tmp_path / "memory"), "--dry-run", protect=None)
    assert main(line) == 4
    assert "was made for adapters alone (--for lora), and this run trains all weights. Type --use_peft" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["push", "nix", "me/new"], 2, "nix does not exist; expected what `ftplus memory make`, or a run, left"),
        (["pull", "me/nothing", "--out", "x"], 6, "The Hub refused me/nothing (RepositoryNotFoundError, 404)"),
        (["pull", "me/empty", "--out", "x"], 6, "me/empty holds no memory: neither manifest.json nor ftplus/memory/"),
        (["pull", "a//b", "--out", "x"], 2, "expected OWNER/NAME"),
        (["pull", "me/empty", "--out", "full"], 6, "full is not an empty folder"),
        (["push", "full", "me/new"], 6, "full holds no manifest.json"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, monkeypatch, capsys, line, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with hub(monkeypatch, tmp_path / "cache") as there:
        there.repos["me/empty"] = {"README.md": b""}
        assert main(["memory", *line]) == code
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("line", ["make --model {model} --protect {data}", "pull me/velmora"])
def test_a_folder_that_cannot_be_is_said_before_anything_is_loaded(place, tmp_path, monkeypatch, capsys, line):
    monkeypatch.setattr("hf_ftplus.shared.made.load", None)
    (tmp_path / "file").touch()
    given = line.format(model=place / "model", data=place / "protect.jsonl").split()
    with hub(monkeypatch, tmp_path / "cache"):
        assert main(["memory", *given, "--out", str(tmp_path / "file" / "memory")]) == 6
    assert "file/memory cannot be written: Not a directory. Choose another" in capsys.readouterr().err


def test_offline_it_says_so(tmp_path, capsys):
    assert main(["memory", "pull", "me/velmora", "--out", str(tmp_path / "x")]) == 6
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_name_that_leads_out_of_the_folder_is_refused(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "memory")
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / "ewc.safetensors", tmp_path / "ewc.safetensors")
    manifest["files"] = {"../ewc": manifest["files"]["ewc"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="is missing or not what was written"):
        verify(folder)


def test_a_cards_table_holds_what_a_user_typed():
    text = card(Base("me/m", None, protect=("a|b=c.jsonl, 3 rows",)), "me/x", {"ewc": 10})
    assert r"| protects | a\|b=c.jsonl, 3 rows |" in text
