"""A verdict for each law: kept or broken, what was found, and how to mend it."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FTPlusError
from ..strategy import Strategy
from .bench import Bench, quiet, rng_restored
from .declared import expected
from .laws import LAWS

FIXES = (
    (
        r"cannot be tried .*\b(no protect|nothing to protect|tasks?\b)",
        "It refuses the rows that it was given: judged = {'tasks': 2} in its class gives learn rows a column `task`; "
        "or check_strategy(..., protect=..., learn=...) in a test of your own.",
    ),
    (
        r"'remembers' cannot be tried",
        "On resume load_state_dict() is called instead of prepare(): take back there whatever prepare() makes.",
    ),
    (r"cannot be tried", "It raised where it should have trained: run it under --debug, or mend what it says."),
    (r"is a public method", "Rename it: a hook of a later hf-ftplus may have its name, and would be called for one."),
    (r"no docstring", "Write one line below `class`: what it does to the user's result. `ftplus plugins` shows it."),
    (r"its name is", 'Write name: ClassVar[str] = "lower-case-words" in the class.'),
    (r"without setting\(\)", "Declare it: strength: float = setting(0.1, 'what it does', unit='nats', low=0)."),
    (r"has no help", "Say in setting(...) what it does to the user's result."),
    (r"without a unit", "Say unit=... in setting(...): nats, rows, nats per squared distance."),
    (r"expected a UsageError", "Call super().__post_init__() first in your own __post_init__: it checks settings."),
    (r"pastes back as", "Leave __repr__ and __eq__ to @dataclass; keep what is not a setting out of its fields."),
    (
        r"called strength, share or weight",
        "Give it a setting that turns it off at 0, or say in its class which does: judged = {'zero': {'NAME': 0}}.",
    ),
    (
        r"'silent at zero'",
        "Return early where the setting is 0: even adding 0 draws random numbers or turns -0.0 into 0.0.",
    ),
    (
        r"at the start",
        "A penalty and its gradient are 0 at the weights of `prepare`. If it is meant to act from the first step (a "
        "loss on outputs, an average): judged = {'from_start': False} in its class.",
    ),
    (
        r"its gradient is 0|its penalty is",
        "Nothing changed beside plain TRL: is the default too weak, the gradient None, the name of a weight not "
        "found? If a first run only records: judged = {'second_run': True} in its class.",
    ),
    (
        r"stopped at step 3 and resumed",
        "Put every tensor that later steps need into state_dict(), and take all of them back in load_state_dict(): it "
        "is called instead of prepare(), on weights that have moved.",
    ),
    (
        r"finish changed weights",
        "Look, and write to run.memory. If moving them at the end is the idea: judged = {'finish': 'moves'} in its "
        "class.",
    ),
    (r"random numbers", "Draw from a torch.Generator of your own, seeded with run.seed."),
    (r"training mode|requires_grad|gradients are recorded", "Put it back in a `finally`, or use a context manager."),
    (r"read_gradients changed gradients", "Read there; what you add to gradients belongs into before_step."),
    (r"changed weights|changed gradients", "`prepare` looks: work on copies, and give .grad back as it was."),
    (r"stays on", "Remove hooks and patches in a `finally`, within the hook that made them."),
    (r"evaluation loss", "Act in hooks alone: what is patched into the model changes evaluation, too."),
    (r"canonical names", "Name tensors as run.weights does."),
    (r"requires a gradient", "Detach what state_dict() returns: weight.detach().clone()."),
    (r"expected only", "Return a flat {name: tensor}; a number is torch.tensor(number)."),
    (r"bytes", "Keep tensors of run.weights alone, four numbers a weight at most; nothing of frozen weights."),
    (r"no longer act", "Add to gradients (grad.add_), do not replace them; leave what others put there."),
    (
        r"two processes|one process and two",
        "Every rank must do the same to the same numbers: reduce what each rank saw of the data, draw nothing by rank.",
    ),
    (
        r"8 rows at once",
        "Sum the loss of a micro-batch over its tokens, never take its mean: the trainer divides. A penalty on weights "
        "belongs into before_step, once per step.",
    ),
    (r"as a callback", "Use what Run gives only: a callback has no trainer behind it."),
    (r"cannot be imported", "Put the class at the top of a module."),
)
"""What is found in a message, and what to do about it; the first that fits."""


@dataclass(frozen=True)
class Verdict:
    """On one law."""

    law: str
    kept: bool
    found: str = ""
    """What broke it."""
    fix: str = ""
    excuse: str = ""
    """Why it is broken knowingly, in the words of the strategy."""
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether the law is broken, and not knowingly."""
        return not self.kept and not self.excuse


@contextlib.contextmanager
def courtroom(strategy: Strategy, **asked: Any) -> Iterator[Bench]:
    """A bench in a folder of its own, without progress bars; the caller's random numbers come back after it."""
    with tempfile.TemporaryDirectory(prefix="ftplus-laws-") as folder, quiet(), rng_restored():
        yield Bench(strategy, Path(folder), **asked)


def judge(
    strategy: Strategy, *, laws: Sequence[Callable[[Bench], None]] | None = None, **asked: Any
) -> Iterator[Verdict]:
    """A verdict on each law in turn. Takes what `check_strategy` takes; raises for nothing that a strategy does."""
    with courtroom(strategy, **expected(strategy, **asked)) as bench:
        for law in LAWS if laws is None else laws:
            yield verdict(bench, law)


def verdict(bench: Bench, law: Callable[[Bench], None]) -> Verdict:
    """Try one law."""
    begin = time.perf_counter()
    try:
        bench.hold(law)
    except AssertionError as error:
        found = str(error)
        # what was raised says little in one sentence; the laws name themselves in theirs
        fix = "" if bench.excuse else fix_for(found)
        return Verdict(bench.law, False, _short(found), fix, bench.excuse, time.perf_counter() - begin)
    return Verdict(bench.law, True, seconds=time.perf_counter() - begin)


def fix_for(found: str) -> str:
    """What to do about the sentence of a broken law."""
    return next(
        (fix for pattern, fix in FIXES if re.search(pattern, found)), "Read the law in hf_ftplus/testing/laws.py."
    )


def refused_lora(strategy: Strategy, **asked: Any) -> str:
    """Why it does not train an adapter, in its own words; empty where it does. A refusal breaks no law."""
    with courtroom(strategy, **expected(strategy, **asked)) as bench:
        try:
            bench.train(bench.fresh(), lora=True, max_steps=1)
        except FTPlusError as error:
            return str(error) if type(error).__name__ == "IncompatibleError" else ""
        except Exception:
            return ""  # the laws will say it
    return ""


def _short(found: str) -> str:
    """Without the names of law and strategy, which stand beside it."""
    return re.sub(r"^Law '[^']*' (?:is broken by '[^']*': |cannot be tried on '[^']*': )", "", found)
