"""A strategy declares each setting once, refuses a bad value by name, and acts only where it says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_ftplus import Strategy, setting
from hf_ftplus.errors import FTPlusError, IncompatibleError, UsageError, nearest
from hf_ftplus.strategy import Memory, configure, settings


@dataclass
class Hold(Strategy):
    """Hold on."""

    name: ClassVar[str] = "hold"
    strength: float = setting(1.0, "how hard it holds", unit="nats per token", low=0)
    rows: int = setting(8, "rows it looks at", unit="rows", low=1, high=100)
    damping: float = setting(1e-3, "what keeps it calm", above=0, high=1)
    kind: str = setting("sign", "how it looks", choices=("sign", "sampled"))
    quiet: bool = setting(False, "say less")
    cap: float | None = setting(None, "never more than this", high=10)
    name_of: str = setting("start", "whom it asks")

    def before_step(self, run) -> None: ...


def test_settings_are_read_from_the_dataclass_in_its_order():
    found = settings(Hold)
    assert [item.name for item in found] == ["strength", "rows", "damping", "kind", "quiet", "cap", "name_of"]
    first = found[0]
    assert (first.type, first.default, first.help, first.unit) == (float, 1.0, "how hard it holds", "nats per token")
    assert settings(Strategy) == []


def test_a_range_is_said_in_words():
    words = {item.name: item.range() for item in settings(Hold)}
    assert words == {
        "strength": "0 or more",
        "rows": "between 1 and 100",
        "damping": "above 0, at most 1",
        "kind": "one of 'sign', 'sampled'",
        "quiet": "",
        "cap": "10 or less",
        "name_of": "",
    }


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("strength", "2.5", 2.5),
        ("strength", 3, 3.0),
        ("strength", "1e4", 10_000.0),
        ("strength", 0, 0.0),
        ("rows", "16", 16),
        ("rows", 16.0, 16),
        ("rows", 100, 100),
        ("quiet", "true", True),
        ("quiet", "No", False),
        ("cap", "none", None),
        ("cap", None, None),
        ("cap", "3", 3.0),
        ("kind", "sampled", "sampled"),
    ],
)
def test_a_value_becomes_the_type_of_its_setting(name, given, taken):
    found = getattr(configure(Hold, {name: given}), name)
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("strength", -1, r"hold\.strength is -1\.0; expected 0 or more\."),
        ("strength", float("nan"), r"hold\.strength is nan; expected 0 or more\."),
        ("strength", "inf", r"hold\.strength is inf; expected 0 or more\."),
        ("strength", "much", r"hold\.strength is 'much'; expected float \(how hard it holds\)\."),
        ("strength", True, r"hold\.strength is True; expected float"),
        ("strength", None, r"hold\.strength is None; expected float"),
        ("rows", 0, r"hold\.rows is 0; expected between 1 and 100\."),
        ("rows", 101, r"hold\.rows is 101; expected between 1 and 100\."),
        ("rows", 1.5, r"hold\.rows is 1\.5; expected int"),
        ("rows", "1.5", r"hold\.rows is '1\.5'; expected int"),
        ("rows", float("inf"), r"hold\.rows is inf; expected int"),
        ("rows", [], r"hold\.rows is \[\]; expected int"),
        ("name_of", None, r"hold\.name_of is None; expected str"),
        ("name_of", ["a"], r"hold\.name_of is \['a'\]; expected str"),
        ("damping", 0, r"hold\.damping is 0\.0; expected above 0, at most 1\."),
        ("damping", 2, r"hold\.damping is 2\.0; expected above 0, at most 1\."),
        ("kind", "sampeld", r"expected one of 'sign', 'sampled'\. Did you mean 'sampled'\?"),
        ("quiet", "perhaps", r"hold\.quiet is 'perhaps'; expected bool"),
        ("cap", 11, r"hold\.cap is 11\.0; expected 10 or less\."),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_range(name, given, said):
    with pytest.raises(UsageError, match=said):
        configure(Hold, {name: given})
    with pytest.raises(UsageError, match=said):
        Hold(**{name: given})


def test_an_unknown_setting_names_the_nearest_and_all_others():
    with pytest.raises(
        UsageError, match=r"hold has no setting 'strenght'\. Did you mean 'strength'\? Settings: strength, rows"
    ):
        configure(Hold, {"strenght": 1})


def test_a_strategy_pastes_back():
    hold = Hold(strength="2", rows=3, cap=4)
    assert eval(repr(hold), {"Hold": Hold}) == hold


def test_a_strategy_acts_only_where_it_overrides():
    hold = Hold()
    assert hold.overrides("before_step")
    assert not any(hold.overrides(hook) for hook in ("prepare", "mix", "token_loss", "after_step", "finish", "metrics"))


def test_a_strategy_that_does_nothing_changes_nothing():
    idle, shares = Strategy(), {"learn": 0.75, "protect": 0.25}
    assert idle.mix(None, shares) == shares
    assert (idle.state_dict(), idle.metrics()) == ({}, {})
    assert idle.prepare(None) is idle.before_step(None) is idle.after_step(None) is idle.finish(None) is None


def test_without_a_folder_memory_reads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = Memory()
    assert memory.load("hold", run=None) is None
    memory.save("hold", {}, run=None)
    assert list(tmp_path.iterdir()) == []


def test_every_error_has_an_exit_code_of_its_own():
    codes = [kind.exit_code for kind in FTPlusError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert (UsageError.exit_code, IncompatibleError.exit_code) == (2, 4)
    assert min(codes) > FTPlusError.exit_code == 1


def test_a_far_word_is_not_guessed():
    assert nearest("ewcc", ["ewc", "l2sp"]) == " Did you mean 'ewc'?"
    assert nearest("zebra", ["ewc", "l2sp"]) == ""


def test_a_memory_is_found_in_its_folder_and_below_the_output_of_its_run(tmp_path, monkeypatch):
    inside = tmp_path / "out" / "ftplus" / "memory"
    inside.mkdir(parents=True)
    assert Memory.at(tmp_path / "out") == tmp_path / "out"  # where there is none, errors name what was typed
    (inside / "manifest.json").touch()
    assert Memory.at(str(tmp_path / "out")) == Memory.at(inside) == inside
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Memory.at("~/out") == inside
