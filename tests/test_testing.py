"""The laws pass strategies that keep them, and each law catches one that breaks it, naming law, strategy and figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from lawful import L2SP, Lopsided, Path, Quarter, SmallLogits
from pages import example

from hf_ftplus import EWC, Strategy, plugins, setting, testing
from hf_ftplus.errors import PluginError
from hf_ftplus.testing import check_strategy


@pytest.mark.dist
def test_ewc_keeps_every_law_on_one_process_and_two():
    check_strategy(EWC())


def test_ewc_keeps_the_laws_with_another_estimator():
    check_strategy(
        EWC(fisher="empirical", strength=3000), processes=False, laws=[testing.law_acts, testing.law_same_anywhere]
    )


def test_the_example_that_authors_read_keeps_the_laws(tmp_path):
    (tmp_path / "idea.py").write_text(example())
    check_strategy(plugins.load(str(tmp_path / "idea.py"))(), processes=False)


def test_a_loss_on_outputs_keeps_the_laws():
    check_strategy(SmallLogits(), from_start=False, processes=False)


def test_a_mixture_keeps_the_laws():
    check_strategy(Quarter(), peft=False, processes=False)


def test_what_only_records_in_a_first_run_is_judged_in_a_second():
    check_strategy(Path(), second_run=True, processes=False)
    with pytest.raises(AssertionError, match=r"'acts' is broken by 'path'.*its gradient is 0"):
        check_strategy(Path(), processes=False)


def broken(strategy, words, *laws, **kwargs):
    """Every other law may hold; these must not, and the message must say so."""
    with pytest.raises(AssertionError, match=words):
        check_strategy(strategy, laws=laws, processes=kwargs.pop("processes", False), **kwargs)


# ---- silent at zero, acts --------------------------------------------------------------------------------------------


@dataclass
class Noisy(L2SP):
    """Decays weights even when told not to."""

    name: ClassVar[str] = "noisy"

    def before_step(self, run):
        super().before_step(run)
        for weight in run.weights.values():
            weight.grad.add_(weight.detach(), alpha=1e-3)


@dataclass
class Idle(Strategy):
    """Nothing at all, with a strength."""

    name: ClassVar[str] = "idle"
    strength: float = setting(1.0, "nothing", unit="nothings", low=0)

    def metrics(self):
        return {"penalty": 0.0}


def test_noise_at_strength_zero_is_caught():
    words = r"Law 'silent at zero' is broken by 'noisy': with \{'strength': 0\} .* end up to \d\.\de-0\d apart"
    broken(Noisy(), words, testing.law_silent_at_zero)


def test_a_strategy_that_cannot_be_turned_off_is_told_how_to_say_so():
    @dataclass
    class Endless(Strategy):
        """No zero."""

        name: ClassVar[str] = "endless"

    broken(Endless(), r"none of its settings is called strength, share or weight.*'zero': ", testing.law_silent_at_zero)
    check_strategy(Endless(), zero={}, laws=[testing.law_silent_at_zero])


def test_a_strategy_that_does_nothing_is_caught():
    broken(Idle(), r"Law 'acts' is broken by 'idle': after 6 steps weights are 0\.0e\+00 from plain", testing.law_acts)


def test_a_penalty_that_pulls_at_the_start_is_caught():
    broken(Noisy(), r"Law 'acts' is broken by 'noisy': it moves weights by \d\.\de-0\d at the start", testing.law_acts)


# ---- same anywhere ---------------------------------------------------------------------------------------------------


def test_a_mean_where_a_sum_belongs_is_caught():
    @dataclass
    class Mean(SmallLogits):
        """Averages over the micro-batch, so it grows with their number."""

        name: ClassVar[str] = "mean"

        def token_loss(self, run, batch):
            return super().token_loss(run, batch) / len(batch.labels)

    broken(
        Mean(),
        "Law 'same anywhere' is broken by 'mean': 8 rows at once and 2 rows four times",
        testing.law_same_anywhere,
    )


def test_a_strategy_that_behaves_otherwise_as_a_callback_is_caught():
    @dataclass
    class Snob(L2SP):
        """Works only where the learn rows came ready for mixing."""

        name: ClassVar[str] = "snob"

        def before_step(self, run):
            import inspect

            callback = next(frame.frame.f_locals["self"] for frame in inspect.stack() if frame.function == "call")
            if callback.within_trainer:
                super().before_step(run)

    broken(Snob(), "Law 'same anywhere' is broken by 'snob': as a callback", testing.law_same_anywhere)


@pytest.mark.dist
def test_ranks_that_part_are_caught():
    broken(
        Lopsided(),
        "'lopsided': two processes' weights and state end up to .* apart",
        testing.law_same_anywhere,
        processes=True,
    )


def test_a_class_that_no_other_process_can_import_is_told_so():
    @dataclass
    class Hidden(L2SP):
        """Lives in a function."""

        name: ClassVar[str] = "hidden"

    broken(Hidden(), "move it to a module, or give processes=False", testing.law_same_anywhere, processes=True)


# ---- remembers, travels light ----------------------------------------------------------------------------------------


def test_an_anchor_taken_again_on_resume_is_caught():
    @dataclass
    class Forgetful(L2SP):
        """Takes the resumed weights for the start."""

        name: ClassVar[str] = "forgetful"

        def load_state_dict(self, state, run):
            self.prepare(run)

    broken(
        Forgetful(),
        "Law 'remembers' is broken by 'forgetful': stopped at step 3 and resumed, weights and uninterrupted ones",
        testing.law_remembers,
    )


def test_a_counter_that_restarts_is_caught():
    @dataclass
    class Counter(Idle):
        """Counts steps, and forgets."""

        name: ClassVar[str] = "counter"

        def __post_init__(self):
            super().__post_init__()
            self.count = 0

        def after_step(self, run):
            self.count += 1

        def state_dict(self):
            return {"count": torch.tensor(float(self.count))}

    broken(
        Counter(),
        r"Law 'remembers' is broken by 'counter': .* its state and an .* end up to 3\.0e",
        testing.law_remembers,
    )


def _whole_model(run):
    """The frozen weights below an adapter; nothing where there is none."""
    frozen = {name: weight for name, weight in run.model.named_parameters() if not weight.requires_grad}
    return {name.replace("base_model.model.", ""): weight.clone() for name, weight in frozen.items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda run: {"a": {"b": torch.ones(1)}}, "expected only"),
        (lambda run: {"steps": 3}, "expected only"),
        (lambda run: {f"base_model.model.{n}": w.detach() for n, w in run.weights.items()}, "expected canonical names"),
        (lambda run: dict(run.weights), "requires a gradient"),
        (_whole_model, r"bytes \(LoRA\), expected at most"),
    ],
    ids=["nested", "a number", "wrapped names", "live weights", "the whole model under LoRA"],
)
def test_heavy_or_crooked_state_is_caught(state, words):
    @dataclass
    class Heavy(Idle):
        """Carries too much."""

        name: ClassVar[str] = "heavy"

        def prepare(self, run):
            self.load = state(run)

        def state_dict(self):
            return self.load

    broken(Heavy(), words, testing.law_travels_light)


# ---- leaves no trace -------------------------------------------------------------------------------------------------


def _forward_hook(run):
    run.model.register_forward_hook(lambda *_: None)


def _patched_forward(run):
    forward = run.model.forward
    run.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _moves(run):
    with torch.no_grad():
        next(iter(run.weights.values())).add_(1e-3)


def _clears(run):
    for weight in run.weights.values():
        weight.grad = None


def _freezes(run):
    next(iter(run.weights.values())).requires_grad_(False)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (lambda run: run.model.eval(), "its prepare changed training mode"),
        (lambda run: torch.rand(1), "its prepare changed torch's random numbers"),
        (_moves, "its prepare changed weights"),
        (_clears, "its prepare changed gradients"),
        (_freezes, "its prepare changed requires_grad"),
        (_forward_hook, "after training something of it stays"),
        (_patched_forward, "the evaluation loss|after training something of it stays"),
    ],
    ids=["mode", "RNG", "weights", "gradients", "requires_grad", "hook", "patched forward"],
)
def test_every_trace_is_caught(trace, words):
    @dataclass
    class Messy(Idle):
        """Leaves something lying about."""

        name: ClassVar[str] = "messy"

        def prepare(self, run):
            trace(run)

    broken(Messy(), words, testing.law_leaves_no_trace, peft=False)


def test_gradients_that_are_changed_where_they_are_to_be_read_are_caught():
    @dataclass
    class Doubler(Idle):
        """Learns twice as fast."""

        name: ClassVar[str] = "doubler"

        def read_gradients(self, run):
            for weight in run.weights.values():
                weight.grad.mul_(2)

    broken(Doubler(), "its read_gradients changed gradients", testing.law_leaves_no_trace, peft=False)


@pytest.mark.fault("C9")
def test_random_numbers_drawn_while_training_are_caught():
    @dataclass
    class Gambler(Idle):
        """Rolls the trainer's dice."""

        name: ClassVar[str] = "gambler"

        def after_step(self, run):
            torch.rand(1)

    broken(Gambler(), "its after_step changed torch's random numbers", testing.law_leaves_no_trace, peft=False)


# ---- introduces itself, gets along -----------------------------------------------------------------------------------


def test_every_way_of_not_introducing_oneself_is_caught():
    @dataclass
    class Unitless(Strategy):
        """A number of what?"""

        name: ClassVar[str] = "unitless"
        strength: float = setting(1.0, "how hard", low=0)

    @dataclass
    class Helpless(Strategy):
        """No word of help."""

        name: ClassVar[str] = "helpless"
        strength: float = setting(1.0, " ", unit="nats", low=0)

    @dataclass
    class Bare(Strategy):
        """A field that nobody declared."""

        name: ClassVar[str] = "bare"
        strength: float = 1.0

    @dataclass
    class Credulous(Idle):
        """Takes any value."""

        name: ClassVar[str] = "credulous"

        def __post_init__(self):
            pass

    @dataclass
    class Mumbling(Idle):
        """Cannot be pasted back."""

        name: ClassVar[str] = "mumbling"

        def __repr__(self):
            return "<Mumbling>"

    @dataclass
    class Shouting(Idle):
        """A name that no flag could take."""

        name: ClassVar[str] = "Shouting Loud"

    @dataclass
    class Silent(Strategy):
        name: ClassVar[str] = "silent"
        things: list = field(default_factory=list, init=False)

    @dataclass
    class Chatty(Idle):
        """Has a method that a later hook could be called like."""

        name: ClassVar[str] = "chatty"

        def teacher(self): ...

    for strategy, words in (
        (Chatty(), r"'chatty': teacher is a public method of its own"),
        (Unitless(), "'unitless': setting strength is a number without a unit"),
        (Helpless(), "'helpless': setting strength has no help"),
        (Bare(), r"'bare': \['strength'\] is a field without setting"),
        (Credulous(), r"'credulous': strength=-1 gives .*names credulous\.strength"),
        (Mumbling(), "'mumbling': <Mumbling> pastes back as"),
        (Shouting(), "its name is 'Shouting Loud'"),
        (Silent(), "'silent': its class has no docstring"),
    ):
        broken(
            strategy, f"Law 'introduces itself' is broken by .*{words.split(':', 1)[-1]}", testing.law_introduces_itself
        )


def test_a_strategy_that_overwrites_what_others_did_is_caught():
    @dataclass
    class Bully(L2SP):
        """Replaces gradients instead of adding to them."""

        name: ClassVar[str] = "bully"

        def before_step(self, run):
            for name, weight in run.weights.items():
                weight.grad.copy_(weight.detach() - self.start[name] + 1e-3)

    broken(
        Bully(),
        "Law 'gets along' is broken by 'bully': when it comes after another strategy, the other no longer acts",
        testing.law_gets_along,
    )


def test_what_a_strategy_raises_is_told_with_law_and_name():
    @dataclass
    class Crash(Idle):
        """Raises."""

        name: ClassVar[str] = "crash"

        def prepare(self, run):
            raise KeyError("lost")

    broken(Crash(), "Law 'acts' cannot be tried on 'crash': PluginError: .*KeyError", testing.law_acts)


def test_weights_moved_at_the_end_are_caught_unless_that_is_the_idea():
    @dataclass
    class Halver(Idle):
        """Halves the weights when all is done."""

        name: ClassVar[str] = "halver"

        def finish(self, run):
            with torch.no_grad():
                for weight in run.weights.values():
                    weight.mul_(0.5)

    broken(Halver(), "its finish changed weights", testing.law_leaves_no_trace, peft=False)
    check_strategy(Halver(), laws=[testing.law_leaves_no_trace], peft=False, processes=False, finish="moves")


# ---- what a class declares -------------------------------------------------------------------------------------------


@dataclass
class Eager(SmallLogits):
    """Acts from the first step on, and says so."""

    name: ClassVar[str] = "eager"
    judged: ClassVar[dict] = {"from_start": False}


def test_what_a_class_declares_is_how_it_is_judged_and_what_is_asked_goes_before_it():
    check_strategy(Eager(), laws=[testing.law_acts], peft=False)
    broken(Eager(), "it moves weights by .* at the start", testing.law_acts, peft=False, from_start=True)


def test_a_law_that_is_broken_knowingly_is_excused_with_the_reason(caplog):
    @dataclass
    class Bold(SmallLogits):
        """Breaks a law, and says why."""

        name: ClassVar[str] = "bold"
        judged: ClassVar[dict] = {"breaks": {"acts": "it is bold"}}

    laws = [testing.law_acts, testing.law_travels_light]
    acts, light = testing.judge(Bold(), laws=laws, peft=False, processes=False)
    assert (acts.kept, acts.excuse, acts.fix, acts.counts) == (False, "it is bold", "", False)
    assert (light.kept, light.excuse) == (True, "")
    check_strategy(Bold(), laws=laws, peft=False)
    assert "It says why: it is bold" in caplog.text


def test_declared_tasks_are_rows_of_so_many():
    @dataclass
    class Chooser(Idle):
        """Wants tasks."""

        name: ClassVar[str] = "chooser"
        judged: ClassVar[dict] = {"tasks": 3, "peft": False}

    world = testing.expected(Chooser())
    assert len(set(world["learn"]["task"])) == 3
    assert (world["peft"], "tasks" in world) == (False, False)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"form_start": False}, r"Odd.judged has 'form_start'. Did you mean 'from_start'\?"),
        ({"from_start": "no"}, "is 'no'; expected True or False"),
        ({"breaks": {"acts": ""}}, "expected {law: reason}"),
        ({"breaks": {"act": "why not"}}, "names the law 'act'. Did you mean 'acts'"),
        ("finish", "expected a dict"),
    ],
)
def test_what_cannot_be_declared_is_refused_by_name(said, words):
    odd = type("Odd", (Idle,), {"judged": said})
    with pytest.raises(PluginError, match=words):
        check_strategy(odd())


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_a_verdict_says_what_was_found_and_how_to_mend_it():
    laws = [testing.law_introduces_itself, testing.law_acts]
    one, two = testing.judge(Idle(), laws=laws, peft=False, processes=False)
    assert (one.law, one.kept, one.found, one.fix) == ("introduces itself", True, "", "")
    assert (two.law, two.kept) == ("acts", False)
    assert two.found.startswith("after 6 steps weights are 0.0e+00")
    assert "is the default too weak" in two.fix


def test_every_sentence_of_a_law_has_a_fix_of_its_own():
    import inspect
    import re

    from hf_ftplus.testing import judged, laws, ranks

    source = inspect.getsource(laws) + inspect.getsource(ranks)
    found = {"{what}": "8 rows at once", "{changed}": "weights", "{wanted}": "strength, share or weight"}
    sentences = [said for said in re.findall(r'f"([^"\n]{25,})"', source) if re.search("expected|are|is|its", said)]
    sentences = [re.sub(r"\{\w+\}", lambda slot: found.get(slot[0], slot[0]), said) for said in sentences]
    sentences = [said for said in sentences if "processes, expected 2" not in said]  # of the machine, not of a strategy
    assert len(sentences) >= 19
    otherwise = judged.fix_for("")
    assert [said for said in sentences if judged.fix_for(said) == otherwise] == []


@pytest.mark.slow
def test_pytest_takes_the_laws_as_tests(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    import lawful

    line = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ftplus",  # found by its entry point
        f"{lawful.__file__}:Quarter:share=0.5", "--ftplus", "idle.py", "-k", "introduces_itself",
    ]  # fmt: skip
    (tmp_path / "idle.py").write_text(
        Path(lawful.__file__).read_text().split("@dataclass")[0]
        + "@dataclass\nclass Idle(Strategy):\n    name: ClassVar[str] = 'idle'\n"
    )
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "Law 'introduces itself' is broken by 'idle': its class has no docstring" in done.stdout
    assert "Write one line below `class`" in done.stdout
    assert "1 failed, 1 passed, 14 deselected" in done.stdout
    line[line.index("--ftplus") + 1] = "gone.py"
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "--ftplus gone.py: No plugin file at 'gone.py'" in done.stderr + done.stdout


@pytest.mark.slow
def test_pytest_covers_what_the_command_covers(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    import click

    from hf_ftplus.cli.plugin_test import test as command

    folder = Path(__file__).parents[1] / "plugins" / "ftplus-kfac"
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "hf_ftplus.pytest_plugin"]
    help = subprocess.run([*pytest_, "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    flags = {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
    for flag in flags - {"--json", "--set"}:  # settings follow the name
        assert flag.replace("--", "--ftplus-", 1) in help, flag
    some = ["-k", "introduces_itself or travels_light"]  # `make plugins` tries them all
    done = subprocess.run(
        [*pytest_, "-q", "-rx", "--ftplus", str(folder), *some], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 6 deselected, 1 xfailed" in done.stdout
    assert "square in the width" in done.stdout


def test_the_strategy_given_is_never_trained_itself():
    given = EWC()
    check_strategy(given, laws=[testing.law_acts])
    assert vars(given) == vars(EWC())


def test_nothing_of_the_laws_stays_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_strategy(L2SP(), laws=[testing.law_acts])
    assert torch.equal(torch.rand(3), expected)
    assert not list(tmp_path.iterdir())
