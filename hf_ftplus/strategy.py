"""All that the author of a strategy must read: the object, its moments, and what it is given.

A strategy is a dataclass. Its fields are its settings (`setting`), its methods are the moments of a training run at
which it may act. All methods are optional; override those you need:

    refuse(run)                      before anything is asked of the model: raise for what cannot work
    prepare(run)                     model placed and sharded, nothing trained
    mix(run, shares) -> shares       share of each task in the training rows, before the first row
    | for each micro-batch:
    |    forward
    |    token_loss(run, batch)      an extra loss, SUMMED over supervised tokens; the trainer divides
    |    backward
    |- read_gradients(run)           gradients complete (accumulated, reduced, unscaled, clipped); look, change nothing
    |- before_step(run)              the same moment, after every strategy has looked: add to the gradients
    |    optimizer.step()
    |- after_step(run)               weights moved, gradients still there
    finish(run)                      last step done; write what the next run needs to run.memory

    state_dict / load_state_dict     tensors that must survive a stop; loaded instead of prepare() on resume
    metrics()                        figures for the training log, asked for once per logging window
    preview(run)                     what prepare() will cost, shown by --dry-run

The smallest useful one, L2-SP (Li 2018), keeps every law (`ftplus plugin test ./idea.py`):

    from dataclasses import dataclass
    from typing import ClassVar
    from hf_ftplus import Strategy, place, setting


    @dataclass
    class L2SP(Strategy):
        '''Pull the weights back to where they started.'''

        name: ClassVar[str] = "l2sp"
        strength: float = setting(0.01, "how hard they are pulled back", unit="nats per squared distance", low=0)

        def prepare(self, run):
            self.start = {name: weight.detach().clone() for name, weight in run.weights.items()}

        def before_step(self, run):
            for name, weight in run.weights.items():
                if self.strength and weight.grad is not None:
                    weight.grad.add_(weight.detach() - self.start[name], alpha=self.strength)

        def state_dict(self):
            return self.start

        def load_state_dict(self, state, run):
            self.start = {name: place(state[name], weight) for name, weight in run.weights.items()}
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import IncompatibleError, UsageError, nearest

if TYPE_CHECKING:
    import torch


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """Declare one setting of a strategy, once: the command line, YAML, help, docs and reports read it from here.

    Args:
        default: value when the user says nothing.
        help: what the setting does to the user's result, in a phrase.
        unit: unit of the value ("nats per token", "rows"), shown in help.
        low, high: smallest and largest allowed value, inclusive.
        above: bound that the value must exceed.
        choices: the only allowed values.
    """
    rule = {"help": help, "unit": unit, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata={"setting": rule})


def place(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, and in the sharding, of the weight `like`; its dtype is kept."""
    if hasattr(like, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


@dataclass
class Strategy:
    """Base of every strategy. Subclasses are dataclasses and are not subclassed further."""

    name: ClassVar[str] = ""
    judged: ClassVar[dict[str, Any]] = {}
    """What the laws must know to judge it (`hf_ftplus/testing/declared.py`); no run reads it."""

    def __post_init__(self) -> None:
        for item in settings(type(self)):
            setattr(self, item.name, item.check(getattr(self, item.name), type(self).name))

    def refuse(self, run: Run | None) -> None:
        """Raise for what cannot work as early as it is known; cheap, since called several times. A run that says that
        it is resumed was asked when it began, and is not asked again.

        Args:
            run: None at first; before the model is loaded, one whose model has shapes and no numbers (torch's meta
                device), if its config tells them; then that of the loaded model, whose `protect` names tasks of which
                no row was read yet, without learn rows; and once more before `prepare`, with all of it. A bare callback
                knows the loaded model only then.
        """

    def prepare(self, run: Run) -> None:
        """The model stands on its device, sharded if it will be, and no step was taken. Not called on resume."""

    def mix(self, run: Run, shares: dict[str, float]) -> dict[str, float]:
        """Change the share of each task in the training rows; shares sum to 1. Called once, before `prepare`.

        `run.tasks` says what there is of each task. Unchanged shares leave the Trainer's own order of rows alone. Where
        several strategies share `max_steps` with protect rows, they are asked before with `run.rows` at 1, for their
        answers say how many rows are left to learn.
        """
        return shares

    def token_loss(self, run: Run, batch: Batch) -> torch.Tensor:
        """An extra loss of one micro-batch: a scalar, summed over its supervised tokens, in nats."""
        raise NotImplementedError

    def read_gradients(self, run: Run) -> None:
        """Every gradient of this optimizer step is complete and no strategy has added to it: read `weight.grad` here.

        Gradients may have been clipped: what training computed is `weight.grad / run.clip`.
        """

    def before_step(self, run: Run) -> None:
        """Every gradient of this optimizer step is complete; add to `weight.grad` here."""

    def after_step(self, run: Run) -> None:
        """The optimizer moved the weights; `weight.grad` is still what moved them. Not called for a skipped step."""

    def finish(self, run: Run) -> None:
        """Training ended. Write what the next run needs with `run.memory.save`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat `{name: tensor}` that a resumed run cannot do without."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor], run: Run) -> None:
        """Take back what `state_dict` gave; called on resume, instead of `prepare`."""

    def preview(self, run: Run) -> dict[str, float]:
        """What `prepare` will cost: `bytes` of state, `rows` of protect data used, `seconds` before the first step."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Figures of the logging window that just ended; logged as `NAME/key`."""
        return {}

    def _usual_strength(self, lora: bool, protects: bool) -> float | None:
        """What `strength` is in a run, also where nothing was said: what `ftplus compare --strengths auto` multiplies.
        None for a strategy that has none.

        Args:
            lora: adapters are trained, not all weights.
            protects: there is protect data.
        """
        return getattr(self, "strength", None)

    def overrides(self, hook: str) -> bool:
        """Whether this strategy acts at `hook`."""
        return getattr(type(self), hook) is not getattr(Strategy, hook)


@dataclass
class Run:
    """What a strategy is given. `weights` are the live trainable tensors by canonical name (see `weights.py`)."""

    model: torch.nn.Module
    weights: dict[str, torch.nn.Parameter]
    protect: dict[str, list[dict[str, torch.Tensor]]]
    """Micro-batches of each protect task: `input_ids`, `labels` (-100 where unsupervised), `attention_mask`."""
    learn: Callable[[int], Sequence[dict[str, torch.Tensor]]]
    """`learn(rows)`: micro-batches of the first `rows` training rows, each made when it is asked for."""
    device: torch.device
    seed: int
    memory: Memory
    autocast: Callable[[], AbstractContextManager] = nullcontext
    """Mixed precision of training, for forward passes of your own: `with run.autocast(): ...`."""
    tokenizer: Any = None
    """The student's tokenizer, if the trainer was given one."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """The tasks that training rows may come from, if any strategy mixes: known from `mix` on."""
    rows: float = 0.0
    """Rows of learn tasks that the run trains on in all: known from `mix` on."""
    step: int = 0
    """Optimizer steps taken so far."""
    learning_rate: float = 0.0
    clip: float | torch.Tensor | None = 1.0
    """Factor, 1 or less, by which clipping scaled the gradients of this step; None where a callback cannot know it."""
    strategies: tuple[Strategy, ...] = ()
    """All strategies of the run, in the order of their turns: `refuse` those that yours cannot work beside."""
    measuring: bool = True
    """Whether this step ends a logging window, so that costly metrics are worth measuring now."""


@dataclass
class Task:
    """One task that training rows may come from, as `mix` sees it; what an epoch draws is filled in after `mix`."""

    role: str
    """`learn` or `protect`."""
    rows: int | None
    """Rows there are (packed ones, with packing); None for a stream."""
    tokens: int | None
    """Supervised tokens in all of them; None where they cannot be counted."""
    drawn: float = 0.0
    """Rows of it in an epoch; of streams, which have no epochs, its share."""
    drawn_tokens: float | None = None
    """Supervised tokens of it in the first epoch; None where they cannot be counted."""


@dataclass
class Batch:
    """One micro-batch as `token_loss` sees it. N supervised positions, width d, vocabulary V."""

    inputs: dict[str, torch.Tensor]
    """The very inputs of the forward pass; give them unchanged to a teacher."""
    hidden: torch.Tensor
    """Last hidden states that predict the supervised tokens, with graph: [N, d]."""
    labels: torch.Tensor
    """The supervised tokens: [N]."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    """The model's own LM head, with its scaling and soft-capping: [n, d] -> [n, V]. Call it on chunks of `hidden`."""


@dataclass
class Memory:
    """What finished runs leave for the next one: a folder to read (`--memory`) and one to write."""

    read: Path | None = None
    write: Path | None = None
    asked: bool = False
    """Whether any strategy looked into it."""

    @staticmethod
    def at(path: str | Path) -> Path:
        """The folder of a memory: `path`, or below it where `path` is the OUTPUT of the run that left it."""
        folder = Path(os.path.expanduser(path))
        inside = folder / "ftplus" / "memory"
        own, below = (os.path.isfile(place / "manifest.json") for place in (folder, inside))
        return inside if below and not own else folder

    def load(self, name: str, run: Run) -> dict[str, torch.Tensor] | None:
        """The tensors that strategy `name` left, or None without `--memory`.

        Raises:
            IncompatibleError: they belong to another model, adapter or shape; the message names the difference.
        """
        from . import state

        self.asked = True
        return None if self.read is None else state.load_memory(self.read, name, run)

    def save(self, name: str, tensors: dict[str, torch.Tensor], run: Run) -> None:
        """Leave `tensors` for the next run of strategy `name`. Every rank calls it; the first one writes."""
        from . import state

        if self.write is not None:
            state.save_memory(self.write, name, tensors, run)


@dataclass(frozen=True)
class Setting:
    """One setting of a strategy class, as `setting()` declared it."""

    name: str
    type: Any
    default: Any
    help: str
    unit: str
    low: float | None
    high: float | None
    above: float | None
    choices: tuple[Any, ...]

    def range(self) -> str:
        """The allowed values in words: `0 or more`, `one of 'sign', 'sampled'`; empty when anything goes."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.above is not None:
            return f"above {self.above:g}" + (f", at most {self.high:g}" if self.high is not None else "")
        if self.low is not None and self.high is not None:
            return f"between {self.low:g} and {self.high:g}"
        if self.low is not None:
            return f"{self.low:g} or more"
        return f"{self.high:g} or less" if self.high is not None else ""

    def check(self, value: Any, strategy: str) -> Any:
        """The value in the setting's own type.

        Raises:
            UsageError: wrong type or out of range; names strategy, setting, value and range.
        """
        where = f"{strategy}.{self.name}"
        try:
            value = _cast(value, self.type)
        except (TypeError, ValueError, KeyError, OverflowError):
            wanted = getattr(self.type, "__name__", str(self.type).removesuffix(" | None"))
            raise UsageError(f"{where} is {value!r}; expected {wanted} ({self.help}).") from None
        if value is None:
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        bad = (
            (self.choices and value not in self.choices)
            or (number and not math.isfinite(value))
            or (number and self.low is not None and value < self.low)
            or (number and self.high is not None and value > self.high)
            or (number and self.above is not None and value <= self.above)
        )
        if bad:
            hint = nearest(str(value), [str(choice) for choice in self.choices]) if self.choices else ""
            raise UsageError(f"{where} is {value!r}; expected {self.range() or 'a finite number'}.{hint}")
        return value


SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _cast(value: Any, kind: Any) -> Any:
    """`value` (often a string of the command line) as `kind`; lossless or an error."""
    options = typing.get_args(kind)
    if options:  # float | None
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _cast(value, next(option for option in options if option is not type(None)))
    if kind is bool:
        return value if isinstance(value, bool) else SWITCHES[str(value).lower()]
    if isinstance(value, bool) or (kind is str and not isinstance(value, (str, int, float, PurePath))):
        raise ValueError(value)
    found = kind(value)
    if kind is int and not isinstance(value, str) and found != value:
        raise ValueError(value)
    return found


def settings(strategy: type[Strategy]) -> list[Setting]:
    """The settings of a strategy class, in the order of its fields."""
    types = typing.get_type_hints(strategy)
    return [
        Setting(name=item.name, type=types[item.name], default=item.default, **item.metadata["setting"])
        for item in dataclasses.fields(strategy)
        if "setting" in item.metadata
    ]


def configure(strategy: type[Strategy], values: dict[str, Any]) -> Strategy:
    """`strategy(**values)`, with an unknown setting refused by name.

    Raises:
        UsageError: unknown setting (with the nearest known one) or a bad value.
    """
    known = [item.name for item in settings(strategy)]
    for key in values:
        if key not in known:
            raise UsageError(
                f"{strategy.name} has no setting {key!r}.{nearest(key, known)} Settings: {', '.join(known) or 'none'}."
            )
    return strategy(**values)


def acts_on_gradients(strategy: Strategy) -> bool:
    """Whether it acts between backward and optimizer step, or looks back on that moment after the step."""
    return any(map(strategy.overrides, ("read_gradients", "before_step", "after_step")))


def refuse_deepspeed(strategies: list[Strategy], stage: int) -> None:
    """Raise for what cannot act under DeepSpeed: with ZeRO-3, or without ZeRO (`stage` 0), what needs whole gradients;
    with ZeRO-3 also what needs the LM head outside of the forward pass."""
    acting = [strategy.name for strategy in strategies if stage not in (1, 2) and acts_on_gradients(strategy)]
    if acting:
        why = f"ZeRO-{stage} keeps every weight in parts" if stage else "without ZeRO shows no gradient"
        raise IncompatibleError(
            f"{', '.join(acting)} acts on weights between backward and optimizer step, when DeepSpeed {why}. Launch "
            "with --accelerate_config zero2, fsdp2 or multi_gpu instead."
        )
    reading = [s.name for s in strategies if stage == 3 and s.overrides("token_loss")]
    if reading:
        raise IncompatibleError(
            f"{', '.join(reading)} reads the LM head outside of the model's forward pass, where DeepSpeed ZeRO-3 keeps "
            "it in parts. Launch with --accelerate_config fsdp2, multi_gpu or zero2 instead."
        )
