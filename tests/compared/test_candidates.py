"""Claims about what may be typed as a candidate, and the rows that it makes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_ftplus.compared.candidates import rows
from hf_ftplus.compared.cells import slug
from hf_ftplus.config import RunConfig
from hf_ftplus.errors import UsageError
from hf_ftplus.strategies.ewc import EWC, FULL, LORA


def config(*strategies, rate=4e-5, lora=False):
    return RunConfig(
        training=SimpleNamespace(learning_rate=rate), model=SimpleNamespace(use_peft=lora), strategies=list(strategies)
    )


def names(*texts, strengths=None, rates=None, **how):
    return [row.name for row in rows(texts, config(**how), strengths, rates)]


def test_plain_is_swept_over_learning_rates_and_others_keep_that_of_the_config():
    found = rows(["none,ewc"], config(rate=4e-5), None, None)
    assert [row.learning_rate for row in found] == [1e-5, 2e-5, 4e-5, 4e-5]
    assert [row.plugins for row in found] == [[], [], [], [{"ewc": {}}]]
    assert names("none", rates="1e-3,2e-3") == ["none:learning_rate=0.001", "none:learning_rate=0.002"]


def test_a_name_in_the_table_can_be_typed_again():
    texts = ["none", "ewc:strength=1e+3:rows=64", "replay:share=0.2+distill"]
    found = rows(texts, config(rate=1 / 3), None, None)
    assert [row.name for row in found][-2:] == ["ewc:strength=1000:rows=64", "replay:share=0.2+distill"]
    again = rows([row.name for row in found], config(rate=1 / 3), None, None)
    assert [vars(row) for row in again] == [vars(row) for row in found]


def test_strengths_are_given_to_whatever_has_one_and_was_not_given_its_own():
    assert names("ewc,replay,si:strength=7", strengths="5,50") == [
        "ewc:strength=5",
        "ewc:strength=50",
        "replay",
        "si:strength=7",
    ]
    assert names("si+ewc", strengths="5") == ["si:strength=5+ewc:strength=5"]


@pytest.mark.parametrize(("lora", "usual"), [(False, FULL), (True, LORA)])
def test_auto_multiplies_the_strength_that_a_run_would_have(lora, usual):
    found = rows(["ewc"], config(lora=lora), "auto", None)
    assert [row.strategies[0].strength for row in found] == pytest.approx([usual / 10, usual, usual * 10])


def test_settings_of_the_config_stay_for_who_says_nothing_else():
    found = rows(["ewc,ewc:strength=9"], config(EWC(strength=3, rows=8)), None, None)
    assert [row.plugins for row in found] == [
        [{"ewc": {"strength": 3.0, "rows": 8}}],
        [{"ewc": {"strength": 9.0, "rows": 8}}],
    ]
    assert [row.strategies[0].strength for row in rows(["ewc"], config(EWC(strength=3)), "auto", None)] == [0.3, 3, 30]


def test_a_file_is_a_candidate(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom hf_ftplus import Strategy, setting\n"
        "@dataclass\nclass Mine(Strategy):\n    name: ClassVar[str] = 'mine'\n    level: int = setting(1, 'how far')\n"
    )
    (found,) = rows([f"{file}:Mine:level=3"], config(), None, None)
    assert found.name == "mine:level=3"
    assert found.plugins == [{f"{file}:Mine": {"level": 3}}]


REFUSED = {
    "unknown": ("none,ewcc", {}, "No plugin 'ewcc'. Did you mean 'ewc'"),
    "unknown setting": ("ewc:strenth=1", {}, "no setting 'strenth'. Did you mean 'strength'"),
    "bad setting": ("ewc:strength=-1", {}, "ewc.strength is '?-1"),
    "nothing": ("", {}, "empty candidate"),
    "a comma too many": ("none,,ewc", {}, "empty candidate"),
    "twice": ("ewc,ewc", {}, "'ewc' twice"),
    "twice under another name": ("ewc:rows=256,ewc", {}, r"'ewc' twice \(first as 'ewc:rows=256'\)"),
    "twice in one": ("ewc+ewc", {}, "a strategy stands twice"),
    "none and more": ("none+ewc", {}, "stands alone"),
    "none with a strength": ("none:strength=1", {}, "It has learning_rate alone"),
    "none with a misspelt rate": ("none:learning_rte=1", {}, "Did you mean 'learning_rate'"),
    "a setting alone": ("strength=1", {}, "expected a name"),
    "no name": (":strength=1", {}, "expected a name"),
    "strengths in words": ("ewc", {"strengths": "automatic"}, "--strengths: 'automatic'; expected numbers"),
    "a strength of 0": ("ewc", {"strengths": "0"}, "--strengths: '0'"),
    "a strength twice": ("ewc", {"strengths": "1,1.0"}, "stands twice"),
    "rates that are none": ("none", {"rates": "1e-3;1e-4"}, "--learning-rates"),
}


@pytest.mark.parametrize(("text", "how", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_candidate_is_refused_in_words(text, how, said):
    with pytest.raises(UsageError, match=said):
        names(text, **how)


def test_folders_hold_any_name_and_differ():
    texts = ["ewc:strength=1", "ewc:strength=1+si", "x" * 300, "x" * 301, "../../etc", "Ü:a=b/c"]
    folders = [slug(text) for text in texts]
    assert len(set(folders)) == len(texts)
    assert all("/" not in folder and len(folder.encode()) < 255 and folder.strip(".") for folder in folders)
