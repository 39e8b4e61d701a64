"""What the README tells to type works as it stands, one line after the other: on a tiny model, in two steps a run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from commands import make_place
from hub import hub
from training import LEARN, PROTECT

from hf_ftplus.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NOTES = [{"text": f"On day {i} we lit {i * 3} lanterns.", "headline": f"{i * 3} lanterns lit"} for i in range(24)]
STANDS_FOR = {
    "Qwen/Qwen3-0.6B": "model",
    "demo": "model",
    "BASE": "model",
    "OUTPUT/checkpoint-60": "OUTPUT/checkpoint-2",
}
"""The tiny model, for those of the README, and what it has after two steps."""
QUICK = {
    "max_steps": 2, "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16, "max_length": 64, "completions": 1, "measure_rows": 8,
}  # fmt: skip


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def lines(title: str) -> list[list[str]]:
    """Every `ftplus ...` of its blocks, as words."""
    text = "".join(re.findall(r"```console\n(.*?)```", section(title), re.DOTALL))
    found = [shlex.split(line, comments=True) for line in re.findall(r"^\$ ftplus (.*)", text, re.M)]
    return [[STANDS_FOR.get(word, word) for word in line] for line in found]


def write_yaml(title: str, **more) -> None:
    """run.yaml as the section shows it, for two steps."""
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section(title), re.DOTALL)[1])
    given["model_name_or_path"] = STANDS_FOR[given["model_name_or_path"]]
    for stage in given.get("stages", ()):
        stage.pop("max_steps", None)
    Path("run.yaml").write_text(yaml.safe_dump({**given, **QUICK, **more}, sort_keys=False))


def works(line: list[str], *more: str) -> None:
    assert main([*line, *more]) == 0, shlex.join(line)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The files that the lines name."""
    place = make_place(tmp_path_factory.mktemp("place"))
    files = {"notes": NOTES, "facts": LEARN, "reviews": LEARN, "reviews_held_out": LEARN[:8], "quiz": LEARN[:8]}
    for name, rows in {**files, "chat": PROTECT, "prompts": [{"prompt": row["prompt"]} for row in PROTECT[:2]]}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("FTPLUS_CACHE", str(place / "cache"))
        yield place


def test_several_tasks_are_checked_shown_and_trained_then_asked_merged_and_scored():
    write_yaml("Several tasks in one run", use_peft=True, lora_r=2, save_steps=2, output_dir="OUTPUT")
    for line in lines("Several tasks in one run"):
        works(line)
    elsewhere = ("compare", "--lm-eval")  # minutes, and another package: they have tests of their own
    for line in lines("After training"):
        if not any(word in line for word in elsewhere):
            works(line)
    assert Path("answers.jsonl").read_text().count("\n") == 2
    assert Path("MERGED", "model.safetensors").is_file()
    assert Path("scores", "report.html").is_file()
    assert list(Path("tasks").iterdir())


def test_runs_follow_one_another(capsys):
    write_yaml("Runs that follow one another")
    works(["sequence", "run.yaml"])
    assert "ACC" in capsys.readouterr().out


def test_a_memory_is_made_pushed_pulled_and_used(monkeypatch, here):
    made, pushed, pulled, used = lines("Protecting a model for others")
    quick = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in QUICK.items()]
    with hub(monkeypatch, here / "hub"):
        works(made)
        works(pushed, "--base", "Qwen/Qwen3-0.6B")  # the tiny model lies in a folder
        Path("memory").rename("memory of the other")
        works(pulled)
    works(used, *quick, "--output_dir", "elsewhere")
