"""What the README tells to type works as it stands, one line after the other: on a tiny model, in two steps a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from commands import QUICK, QUICKLY, make_place, typed
from hub import hub
from training import LEARN, PROTECT

from hf_ftplus.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTES = [{"text": f"On day {i} we lit {i * 3} lanterns.", "headline": f"{i * 3} lanterns lit"} for i in range(24)]
STANDS_FOR = {
    "Qwen/Qwen3-0.6B": "model",
    "demo": "model",
    "BASE": "model",
    "OUTPUT/checkpoint-60": "OUTPUT/checkpoint-2",
}
"""The tiny model, for those of the README, and what it has after two steps."""


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def lines(title: str) -> list[list[str]]:
    """Every `ftplus ...` of its blocks, as words."""
    return [[STANDS_FOR.get(word, word) for word in line] for line in typed(section(title))]


def write_yaml(title: str, **more) -> None:
    """run.yaml as the section shows it, for two steps."""
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section(title), re.DOTALL)[1])
    given["model_name_or_path"] = STANDS_FOR[given["model_name_or_path"]]
    for stage in given.get("stages", ()):
        stage.pop("max_steps", None)
    Path("run.yaml").write_text(yaml.safe_dump({**given, **QUICK, **more}, sort_keys=False))


RUN = (
    "Install",
    "Three ways in",
    "Several tasks in one run",
    "Protecting a model for others",
    "After training",
    "Publishing one",
)
"""Sections whose lines are typed below; pages of plugins are in plugins/test_every.py."""
SEVERAL = ("--num_processes", "--lm-eval", "compare")
"""What takes several devices, another package, or minutes: they have tests of their own."""


def runs(line: list[str]) -> bool:
    return not any(word in line for word in SEVERAL)


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


def test_every_section_with_lines_to_type_is_typed_here():
    titles = [part.partition("\n")[0] for part in README.split("\n## ")[1:]]
    assert [title for title in titles if typed(section(title))] == list(RUN)


def test_the_first_lines_lead_to_a_page(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    shutil.copy(here / "facts.jsonl", "facts.jsonl")
    answers = ["--model", str(here / "model"), "--learn", "facts.jsonl", "--protect", "self:8", "--hardware", "cpu"]
    quick = [word for word in QUICKLY if "max_length" not in word]  # rows go without padding there, and are not cut
    for line in lines("Install"):
        works(line, *(answers if line == ["init"] else quick if line[0] == "sft" else []))
    assert Path("out", "ftplus", "report.html").is_file()


def test_the_ways_in_work(here, capsys):
    whole = lines("Three ways in")[0]
    shutil.copy("chat.jsonl", "old.jsonl")
    shutil.copy("facts.jsonl", "learn.jsonl")
    (here / "CONFIG").mkdir()
    shutil.copy("model/config.json", "CONFIG/config.json")
    for line in filter(runs, lines("Three ways in")):
        if "..." in line:
            line = [*whole, *(word for word in line if word not in ("...", *whole))]
        as_if = "--as-if" in line  # it needs no data
        works(line, *([*QUICKLY, "--output_dir", f"way {len(line)}"] if line[0] == "sft" and not as_if else []))
    assert "wire" in capsys.readouterr().out


def test_a_strategy_is_begun_and_judged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, judged = lines("Publishing one")
    works(new)
    works(judged, "--law", "introduces itself")


def test_several_tasks_are_checked_shown_and_trained_then_asked_merged_and_scored():
    write_yaml("Several tasks in one run", use_peft=True, lora_r=2, save_steps=2, output_dir="OUTPUT")
    for line in lines("Several tasks in one run"):
        works(line)
    for line in filter(runs, lines("After training")):
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
    with hub(monkeypatch, here / "hub"):
        works(made)
        works(pushed, "--base", "Qwen/Qwen3-0.6B")  # the tiny model lies in a folder
        Path("memory").rename("memory of the other")
        works(pulled)
    works(used, *QUICKLY, "--output_dir", "elsewhere")
