"""Find out whether a strategy keeps the laws that all strategies keep; for ours, and for yours.

    from hf_ftplus.testing import check_strategy

    def test_my_strategy_keeps_the_laws():
        check_strategy(MyStrategy())

`judge` returns a verdict for each law instead, with what was found and how to mend it (`ftplus plugin test NAME`,
`pytest --ftplus NAME`). Each law is a function (`laws.py`), and trains a Llama of some thousand weights on random
tokens, on the CPU, without network, in about 20 seconds for all of them. What breaks a law raises an AssertionError of
one sentence that names law, strategy and figure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..strategy import Strategy
from .bench import VOCAB, Bench, tiny_batches, tiny_model, tiny_rows, tiny_tokenizer
from .declared import expected
from .judged import Verdict, courtroom, judge
from .laws import (
    LAWS,
    law_acts,
    law_gets_along,
    law_introduces_itself,
    law_leaves_no_trace,
    law_remembers,
    law_same_anywhere,
    law_silent_at_zero,
    law_travels_light,
)

logger = logging.getLogger("hf_ftplus")

__all__ = [
    "LAWS",
    "VOCAB",
    "Bench",
    "Verdict",
    "check_strategy",
    "judge",
    "law_acts",
    "law_gets_along",
    "law_introduces_itself",
    "law_leaves_no_trace",
    "law_remembers",
    "law_same_anywhere",
    "law_silent_at_zero",
    "law_travels_light",
    "tiny_batches",
    "tiny_model",
    "tiny_rows",
    "tiny_tokenizer",
]


def check_strategy(
    strategy: Strategy,
    *,
    protect: Any = None,
    peft: bool | None = None,
    processes: bool = True,
    second_run: bool | None = None,
    from_start: bool | None = None,
    zero: dict[str, Any] | None = None,
    learn: Any = None,
    finish: str | None = None,
    breaks: dict[str, str] | None = None,
    laws: Sequence[Callable[[Bench], None]] | None = None,
) -> None:
    """Train with `strategy` in many ways and demand that it keeps every law.

    What is left out is read from `judged` of its class (`declared.py`); a law that stands in its `breaks` is tried,
    and only logged if it is broken.

    Args:
        strategy: with the settings to judge it by; the object itself is never trained, only copies are.
        protect: ready micro-batches (or a dict of them) with token ids below `VOCAB`; random ones when left out.
        peft: also judge it on a LoRA adapter, as usual. False for a strategy that refuses adapters.
        processes: also train on two processes, which takes some 10 seconds; the class must be importable.
        second_run: judge it in a run that has the memory of a first one. For strategies that only record in the first.
        from_start: whether it does nothing until weights leave their start. Left out: True, unless it mixes tasks.
        zero: settings that turn it off. Left out: `strength`, `share` or `weight` at 0.
        learn: a dataset to train on, of `input_ids` and `labels` below `VOCAB`: `tiny_rows` with a column `task`, say.
        finish: "moves" if the last hook may move the weights, as averaging them does; else it may only look.
        breaks: laws that it breaks knowingly, each with the reason.
        laws: only these, of `LAWS`.

    Raises:
        AssertionError: a law is broken; names law, strategy and figure.
    """
    asked = {"second_run": second_run, "from_start": from_start, "zero": zero, "learn": learn, "finish": finish}
    world = expected(strategy, protect=protect, peft=peft, processes=processes, breaks=breaks, **asked)
    with courtroom(strategy, **world) as bench:
        for law in LAWS if laws is None else laws:
            try:
                bench.hold(law)
            except AssertionError as error:
                if not bench.excuse:
                    raise
                logger.warning("ftplus: warning: %s It says why: %s", error, bench.excuse)
