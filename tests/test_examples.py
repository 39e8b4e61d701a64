"""Every script under examples/ runs as it stands, offline, on a tiny model, and its strategies act."""

from __future__ import annotations

import difflib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import trl
import yaml
from hub import hub
from tiny import MARKED, tiny_llama, tiny_tokenizer
from training import trainer

import hf_ftplus
from hf_ftplus.advice import TABLE
from hf_ftplus.cli import main
from hf_ftplus.cli.doctor import TESTED, installed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that also 4-bit packing takes: 64 weights share a scale."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden=64).save_pretrained(folder)
    tiny_tokenizer(MARKED).save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Run an example, from the top of the repository unless told `where`; its globals."""

    def run(name, *words, where=ROOT, **variables):
        for key, value in {"MODEL": model, "OUT": tmp_path, **variables}.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.chdir(where)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("name", ["causal_lm.py", "dpo.py", "lora.py"])
def test_ewc_holds_weights_in(run, name):
    trainer = run(name)["trainer"]
    assert trainer.state.global_step == 6
    assert logged(trainer, "ewc/penalty")[-1] > 0


def test_distill_acts_beside_a_loss_of_ones_own(run):
    found = run("own_trainer.py")
    assert type(found["trainer"]).__name__ == "FocalTrainer"
    assert isinstance(found["trainer"], found["FocalTrainer"])
    assert logged(found["trainer"], "distill/kl_protect")[-1] > 0


def test_qlora_trains_an_adapter_on_four_bits(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = run("qlora.py")["trainer"]
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    assert logged(trainer, "ewc/penalty")[-1] > 0
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_without_data_the_model_writes_what_is_protected(run, capsys):
    trainer = run("no_data.py", ROWS=4)["trainer"]
    advised = next(item.take for item in TABLE if item.key == "none")
    assert all(f"--set {name}" in advised for name in ("replay.share=0.0625 ", "ewc.strength=3000 "))
    assert [(it.name, getattr(it, "share", it.__dict__.get("strength"))) for it in trainer.ftplus.strategies] == [
        ("replay", 0.0625),
        ("ewc", 3000),
    ]
    assert logged(trainer, "ewc/penalty")[-1] > 0
    file = Path(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4


def test_trls_own_script_gains_one_line(run, model, tmp_path, capfd):
    """As examples/README.md tells to type it."""
    page = re.sub(r"\\\n", " ", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    words = shlex.split(re.search(r"python examples/trl_sft.py (.*)", page)[1])
    words += shlex.split(re.search(r"without a GPU also `(.*?)`", page)[1])
    here = {"--model_name_or_path": model, "--dataset_name": tmp_path / "data", "--output_dir": tmp_path / "out"}
    for flag, value in {**here, "--max_steps": 2}.items():
        words[words.index(flag) + 1] = value
    data = tmp_path / "data"  # `load_dataset` takes a folder
    data.mkdir()
    (data / "train.jsonl").write_bytes((EXAMPLES / "data" / "learn.jsonl").read_bytes())
    run("trl_sft.py", *words, "--logging_steps", 1)
    assert "ewc/penalty" in capfd.readouterr().out
    assert (tmp_path / "out" / "ftplus" / "memory" / "ewc.safetensors").is_file()


@pytest.mark.skipif(installed("trl") != TESTED["trl"], reason="a copy of the script of one version of TRL")
def test_the_script_is_trls_own_but_for_that_line():
    from trl.scripts import sft

    theirs = Path(sft.__file__).read_text(encoding="utf-8").splitlines()
    ours = (EXAMPLES / "trl_sft.py").read_text(encoding="utf-8").splitlines()
    changes = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
    assert [line[0] for line in changes] == ["+", "+"]
    assert changes[0].split() == ["+", "import", "hf_ftplus"]
    assert "hf_ftplus.attach(trainer, " in changes[1]


def test_the_three_ways_end_with_the_same_weights(run, model, tmp_path, capsys):
    (tmp_path / "demo").symlink_to(model)  # a folder of that name goes before the embedded model
    run("three_ways.py", where=tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "same weights" in line]
    assert [line.split()[-1] for line in said] == ["True", "True", "True"]


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """A folder in which the demo's data is where the YAML files look for it."""
    place = tmp_path_factory.mktemp("place")
    sys.path.insert(0, str(EXAMPLES / "demo"))
    try:
        from make_data import make_data
    finally:
        sys.path.pop(0)
    make_data(place / "demo_output" / "data")
    return place


def test_several_tasks_learn_from_one_yaml(demo_data, model, monkeypatch):
    monkeypatch.chdir(demo_data)
    file = str(EXAMPLES / "multitask.yaml")
    assert main(["data", "check", "--config", file, "--model_name_or_path", str(model)]) == 0
    few = ["--max_steps", "2", "--measure_rows", "4", "--completions", "0", "--per_device_train_batch_size", "4"]
    assert main(["sft", "--config", file, "--model_name_or_path", str(model), "--max_length", "400", *few]) == 0
    page = (demo_data / "demo_output" / "multitask" / "ftplus" / "report.md").read_text(encoding="utf-8")
    assert all(task in page for task in ("summaries", "facts", "python"))


def test_three_stages_follow_one_another(demo_data, model, monkeypatch):
    monkeypatch.chdir(demo_data)
    given = yaml.safe_load((EXAMPLES / "sequence" / "sequence.yaml").read_text(encoding="utf-8"))
    few = {"model_name_or_path": str(model), "max_steps": 2, "measure_rows": 4, "keep": 4}
    short = {"max_length": 400, "padding_free": False}  # the tiny model reads no more
    given |= {**few, **short, "plugins": [{"ewc": {"strength": 1000, "rows": 4}}, {"replay": {"share": 0.25}}]}
    for stage in given["stages"][1:]:
        stage["max_steps"] = 2
    matrix = hf_ftplus.sequence(given)
    assert matrix.stages == ["summaries", "facts", "reviews"]


def test_model_card_and_memory_reach_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config", "examples/push.yaml", "--model_name_or_path", str(model), "--hub_model_id", "me/lighthouses"]
    with hub(monkeypatch, tmp_path / "cache") as there:
        assert main(["sft", *words, "--output_dir", str(tmp_path / "out")]) == 0
    files = there.repos["me/lighthouses"]
    assert {"model.safetensors", "ftplus/memory/manifest.json", "ftplus/memory/ewc.safetensors"} <= files.keys()
    card = files["README.md"].decode()
    assert "general" in card
    assert "retention" in card


@pytest.mark.parametrize(("asked", "said"), [("create", ""), ("commit", "push it later: hf upload me/x")])
def test_a_hub_that_refuses_is_one_sentence_and_costs_no_model(model, tmp_path, monkeypatch, capsys, asked, said):
    monkeypatch.chdir(ROOT)
    words = ["--config", "examples/push.yaml", "--model_name_or_path", str(model), "--hub_model_id", "me/x"]
    with hub(monkeypatch, tmp_path / "cache") as there:
        there.forbidden = asked
        few = ["--max_steps", "1", "--measure_rows", "0"]
        assert main(["sft", *words, *few, "--output_dir", str(tmp_path / "out")]) == 6
    error = capsys.readouterr().err
    assert "The Hub refused me/x (HfHubHTTPError, 403)" in error
    assert "hf auth login" in error
    assert said in error
    assert (tmp_path / "out" / "model.safetensors").is_file() == (asked == "commit")


def test_the_notebook_draws_what_each_strategy_learns_and_loses(model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for key, value in {"MODEL": model, "OUT": tmp_path, "STEPS": 2, "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(key, str(value))
    cells = json.loads((EXAMPLES / "retention.ipynb").read_text(encoding="utf-8"))["cells"]
    known = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), known)
            assert cell["outputs"] == []
    curves = known["curves"]
    assert {len(points) for points in curves.values()} == {3}
    assert len({points[0] for points in curves.values()}) == 1
    assert len({points[-1] for points in curves.values()}) == 3
    assert (tmp_path / "retention.png").stat().st_size > 10_000


def test_the_picture_of_the_readme_is_what_was_measured(run, tmp_path):
    def marks(file):
        """Places of markers and ticks."""
        found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', file.read_text(encoding="utf-8"))
        return torch.tensor([[float(x), float(y)] for x, y in found])

    version = pytest.importorskip("matplotlib").__version__
    if f"Matplotlib v{version}," not in (EXAMPLES / "picture.svg").read_text(encoding="utf-8"):
        pytest.skip("each version has margins of its own")
    run("picture.py", OUT=tmp_path / "picture.svg")
    rows = json.loads((EXAMPLES / "benchmarks" / "strategies.json").read_text(encoding="utf-8"))
    assert len(marks(tmp_path / "picture.svg")) > sum("sentiment" not in row for row in rows)
    kept, drawn = marks(EXAMPLES / "picture.svg"), marks(tmp_path / "picture.svg")
    again = "Draw it again: python examples/picture.py"
    assert kept.shape == drawn.shape, again
    assert torch.allclose(kept, drawn, atol=1), again


def test_the_tables_of_the_readmes_are_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    import strategies

    shown = [("README.md", strategies.brief())]
    shown += [("examples/benchmarks/README.md", table) for table in strategies.whole()]
    for page, table in shown:
        assert table in (EXAMPLES.parent / page).read_text(encoding="utf-8"), f"Put this into {page}:\n\n{table}\n"


UNTRIED = {
    "demo/run.py": "`make demo`: a real model, minutes",
    "demo/demo.yaml": "of demo/run.py",
    "sequence/run.py": "`--each` takes a quarter of an hour; a test runs its sequence.yaml",
}
"""Examples that no test runs, and why; examples/README.md says so, too. The benchmarks have tests of their own."""


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.py"))
    found = [path for kind in ("*.py", "*.yaml", "*.ipynb") for path in EXAMPLES.rglob(kind)]
    scripts = [path for path in found if "benchmarks" not in path.relative_to(EXAMPLES).parts]
    assert len(scripts) > 15
    known = {path.relative_to(EXAMPLES).as_posix() for path in scripts}
    assert UNTRIED.keys() <= known
    stems = {name: re.escape(Path(name).stem) for name in known}
    how = r"[\"'/]{0}(\.py|\.yaml|\.ipynb)?[\"']|^ *(import .*\b{0}\b|from {0} import)"  # by its file, or as a module
    named = {name for name in known if re.search(how.format(stems[name]), tests, re.M)}
    assert known - named - UNTRIED.keys() == set()


def package(folder, **modules):
    """A package that is not installed here: its modules hold only what an adapter takes from them."""
    for name, text in modules.items():
        file = folder.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_axolotls_plugin_attaches_what_its_yaml_names(tmp_path, monkeypatch):
    package(tmp_path, axolotl__integrations__base="class BasePlugin: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES / "adapters")
    import axolotl_ftplus

    plugin = axolotl_ftplus.FTPlusPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    given = {"strategies": ["ewc", "distill"], "protect": str(EXAMPLES / "data" / "protect.jsonl")}
    cfg = getattr(sys.modules[module], name)(ftplus=given)
    it = trainer(tmp_path, cls=trl.SFTTrainer)
    plugin.post_trainer_create(cfg, it)
    it.train()
    assert logged(it, "ewc/penalty")[-1] > 0
    assert logged(it, "distill/kl_protect")[-1] > 0
    untouched = trainer(tmp_path, cls=trl.SFTTrainer)
    plugin.post_trainer_create(getattr(sys.modules[module], name)(), untouched)
    assert type(untouched) is trl.SFTTrainer


def test_swifts_callback_acts(tmp_path, monkeypatch):
    package(tmp_path, swift__callbacks="callbacks_map = {}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FTPLUS_PROTECT", str(EXAMPLES / "data" / "protect.jsonl"))
    runpy.run_path(str(EXAMPLES / "adapters" / "swift_ftplus.py"))
    it = trainer(tmp_path, cls=trl.SFTTrainer)
    it.add_callback(sys.modules["swift.callbacks"].callbacks_map["ftplus"](it.args, it))
    it.train()
    assert logged(it, "ewc/penalty")[-1] > 0
