"""What every strategy keeps to, whoever wrote it; each law trains on a `Bench` and says what it found."""

from __future__ import annotations

import dataclasses
import math
import re
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..callback import NEEDS_TRAINER
from ..contract import HOOKS, NAME
from ..errors import UsageError
from ..plugins import headline
from ..strategy import Setting, Strategy, settings
from ..weights import trainable
from .bench import Bench, Companion, Look, Weights, distance, last_logged, state_of, strategy_of, weights_of
from .ranks import two_processes

ZEROS = ("strength", "share", "weight")
BYTES_PER_WEIGHT = 16
"""State allowed for each trainable weight: four numbers in fp32."""

WRAPPED = r"\b(base_model\.model|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|lora_[AB]\.default)\."


def law_silent_at_zero(bench: Bench) -> None:
    """Turned off, it trains bit-identically to plain TRL, dropout and all."""
    off = bench.zero if bench.zero is not None else _zero(bench)
    for kind in bench.kinds:
        silent, plain = (
            bench.train(bench.fresh(**off), lora=kind.lora, dropout=0.1),
            bench.plain(lora=kind.lora, dropout=0.1),
        )
        bench.equal(weights_of(silent), weights_of(plain), f"with {off} weights and plain TRL's ({kind})")


def law_same_anywhere(bench: Bench) -> None:
    """8 rows at once = 2 rows four times; a callback = the trainer; one process = two."""
    gentle = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 3}
    at_once, in_four = (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    )
    whole = weights_of(bench.train(bench.fresh(), **gentle, **at_once))
    plain = weights_of(bench.plain(**gentle, **at_once))
    _same_update(
        bench,
        whole,
        weights_of(bench.train(bench.fresh(), **gentle, **in_four)),
        plain,
        "8 rows at once and 2 rows four times",
    )
    if not any(bench.strategy.overrides(hook) for hook in NEEDS_TRAINER):
        # a callback cannot know by how much gradients were clipped: what reads them may refuse it then
        known = {"max_grad_norm": 0.0} if bench.strategy.overrides("read_gradients") else {}
        inside, outside = bench.train(bench.fresh(), **known), bench.train(bench.fresh(), callback=True, **known)
        bench.equal(weights_of(inside), weights_of(outside), "as a callback, weights and those of the trainer")
    if bench.processes:
        one, other = two_processes(bench, {**gentle, "per_device_train_batch_size": 4})
        bench.equal(one, other, "two processes' weights and state")
        _same_update(bench, whole, {name: one[f"weights.{name}"] for name in whole}, plain, "one process and two")


def law_remembers(bench: Bench) -> None:
    """Stopped and resumed, it ends where it would have ended, bit for bit, and knows what it would have known."""
    for kind in bench.kinds:
        folder = str(bench.new_folder())
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "output_dir": folder}
        whole = bench.train(bench.fresh(), lora=kind.lora, dropout=0.1, **saving)
        resumed = bench.train(bench.fresh(), lora=kind.lora, dropout=0.1, resume=f"{folder}/checkpoint-3", **saving)
        bench.equal(
            weights_of(whole),
            weights_of(resumed),
            f"stopped at step 3 and resumed, weights and uninterrupted ones ({kind})",
        )
        bench.equal(
            state_of(whole),
            state_of(resumed),
            f"stopped at step 3 and resumed, its state and an uninterrupted one ({kind})",
        )


def law_leaves_no_trace(bench: Bench) -> None:
    """After each hook random numbers, modes and, but where it is to move them, weights and gradients are as found;
    nothing stays in the model after training.
    """
    for kind in bench.kinds:
        before, after = Look("look before"), Look("look after")
        trainer = bench.train(before, bench.fresh(), after, lora=kind.lora, dropout=0.1)
        for (hook, found), (_, left) in zip(before.seen, after.seen, strict=True):
            free = ("weights",) if hook == "finish" and bench.finish == "moves" else ()
            changed = ", ".join(sorted(key for key in found if found[key] != left[key] and key not in free))
            bench.demand(not changed, f"its {hook} changed {changed} ({kind}), expected nothing")
        plain = bench.plain(lora=kind.lora, dropout=0.1)
        usual = _fixtures(plain.model)
        stays = [name or "the model" for name, now in _fixtures(trainer.model).items() if now != usual[name]]
        bench.demand(
            not stays, f"after training something of it stays on {', '.join(stays[:3])}, expected no hook, no patch"
        )
        # the very same weights in both, so that only a trace could tell them apart
        plain.model.load_state_dict(trainer.model.state_dict())
        mine, theirs = (it.evaluate()["eval_loss"] for it in (trainer, plain))
        bench.demand(
            mine == theirs, f"the evaluation loss is {mine:.6f} with it and {theirs:.6f} without, expected the same"
        )


def law_travels_light(bench: Bench) -> None:
    """Its state is a flat dict of tensors under canonical names, no larger than 16 bytes for each trainable weight."""
    for kind in bench.kinds:
        trainer = bench.train(bench.fresh(), lora=kind.lora)
        state = strategy_of(trainer).state_dict()
        odd = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
        bench.demand(not odd, f"state_dict() holds {odd[:1]}, expected only {{str: Tensor}}")
        wrapped = [key for key in state if re.search(WRAPPED, key)]
        bench.demand(
            not wrapped, f"state_dict() calls a tensor {wrapped[:1]}, expected canonical names as in run.weights"
        )
        graphs = [key for key, value in state.items() if value.requires_grad]
        bench.demand(not graphs, f"{graphs[:1]} in state_dict() requires a gradient, expected detached tensors")
        held = sum(value.numel() * value.element_size() for value in state.values())
        allowed = BYTES_PER_WEIGHT * sum(weight.numel() for weight in trainable(trainer.model).values()) + 1024
        bench.demand(held <= allowed, f"its state takes {held} bytes ({kind}), expected at most {allowed}")


def law_introduces_itself(bench: Bench) -> None:
    """`repr` pastes back; it, and each setting, has help; numbers have units; a bad value is refused by name; no method
    of its own has a name that a later hook may take."""
    kind, strategy = type(bench.strategy), bench.strategy
    named = NAME.fullmatch(kind.name or "")
    bench.demand(bool(named), f"its name is {kind.name!r}, expected lower-case letters, digits, - and _")
    bench.demand(bool(headline(kind)), "its class has no docstring, expected a line of help")
    own = _own_methods(kind)
    bench.demand(not own, f"{own and own[0]} is a public method of its own, expected a name that begins with _")
    pasted = _pasted(strategy)
    bench.demand(pasted == strategy, f"{strategy!r} pastes back as {pasted!r}, expected an equal strategy")
    known = {item.name: item for item in settings(kind)}
    bare = [item.name for item in dataclasses.fields(kind) if item.init and item.name not in known]
    bench.demand(not bare, f"{bare[:1]} is a field without setting(), expected default and help for each")
    for item in known.values():
        bench.demand(bool(item.help.strip()), f"setting {item.name} has no help")
        bench.demand(bool(item.unit) or not _needs_unit(item), f"setting {item.name} is a number without a unit")
        where = f"{kind.name}.{item.name}"
        for value in _bad_values(item):
            said = _refusal(kind, item.name, value)
            bench.demand(
                where in said, f"{item.name}={value!r} gives {said!r}, expected a UsageError that names {where}"
            )


def law_gets_along(bench: Bench) -> None:
    """Beside another strategy, before or after it, both act."""
    alone, other = weights_of(bench.train(bench.fresh())), weights_of(bench.train(Companion()))
    acts = distance(alone, weights_of(bench.plain())) > 0
    for order, pair in (("before", [bench.fresh(), Companion()]), ("after", [Companion(), bench.fresh()])):
        both = weights_of(bench.train(*pair))
        bench.demand(
            not acts or distance(both, other) > 0,
            f"{order} another strategy it no longer acts: nothing changes without it",
        )
        bench.demand(distance(both, alone) > 0, f"when it comes {order} another strategy, the other no longer acts")


def law_acts(bench: Bench) -> None:
    """It does nothing at the starting weights, and something as soon as they move."""
    from_start = bench.from_start if bench.from_start is not None else not bench.strategy.overrides("mix")
    for kind in bench.kinds:
        if from_start:
            step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-2, "logging_steps": 1, "max_grad_norm": 0.0}
            first = bench.train(bench.fresh(), lora=kind.lora, **step)
            far = distance(weights_of(first), weights_of(bench.plain(lora=kind.lora, **step)))
            bench.demand(
                far <= 1e-6, f"it moves weights by {far:.1e} at the start, before any left it ({kind}), expected 0"
            )
            penalty = last_logged(first, f"{bench.name}/penalty")
            bench.demand(not penalty, f"its penalty is {penalty} at the start ({kind}), expected 0")
        moved = bench.train(bench.fresh(), lora=kind.lora, max_steps=6, logging_steps=6)
        far = distance(weights_of(moved), weights_of(bench.plain(lora=kind.lora, max_steps=6)))
        bench.demand(far > 0, f"after 6 steps weights are {far:.1e} from plain TRL's ({kind}): its gradient is 0")
        penalty = last_logged(moved, f"{bench.name}/penalty")
        bench.demand(
            penalty is None or penalty > 0, f"its penalty is {penalty} after 6 steps ({kind}), expected more than 0"
        )


LAWS = (
    law_introduces_itself,
    law_silent_at_zero,
    law_acts,
    law_remembers,
    law_leaves_no_trace,
    law_travels_light,
    law_gets_along,
    law_same_anywhere,
)


def _same_update(bench: Bench, one: Weights, other: Weights, plain: Weights, what: str) -> None:
    """Equal to rounding; and far closer than what the strategy does, where it does more than rounding."""
    far, effect = distance(one, other), distance(one, plain)
    allowed = min(1e-6, effect / 10) if effect > 2e-6 else 1e-6
    bench.demand(far <= allowed, f"{what} end with weights up to {far:.1e} apart, expected at most {allowed:.1e}")


def _zero(bench: Bench) -> dict[str, Any]:
    """The setting that turns a strategy off, at 0."""
    known = [item.name for item in settings(type(bench.strategy))]
    found = [name for name in ZEROS if name in known]
    wanted = "strength, share or weight; give it one, or say what turns it off: judged = {'zero': {...}}"
    bench.demand(bool(found), f"none of its settings is called {wanted}")
    return {found[0]: 0}


def _pasted(strategy: Strategy) -> Any:
    """What `repr` evaluates to; the error if it does not."""
    kind = type(strategy)
    try:
        written = repr(strategy).replace(kind.__qualname__, kind.__name__, 1)  # classes inside functions, as in tests
        return eval(written, {kind.__name__: kind, "nan": math.nan, "inf": math.inf})
    except Exception as error:
        return error


def _needs_unit(item: Setting) -> bool:
    """Numbers do, shares (between 0 and 1) do not."""
    number = isinstance(item.default, (int, float)) and not isinstance(item.default, bool)
    return number and not item.choices and not (item.high == 1 and (item.low == 0 or item.above == 0))


def _bad_values(item: Setting) -> list[Any]:
    """Values that its declaration rules out."""
    bad = [item.low - 1] if item.low is not None else []
    bad += [item.high + 1] if item.high is not None else []
    bad += [item.above] if item.above is not None else []
    bad += ["none of these"] if item.choices else []
    return bad + ([math.nan, "a word"] if isinstance(item.default, (int, float)) else [])


def _refusal(kind: type[Strategy], name: str, value: Any) -> str:
    try:
        return f"{kind(**{name: value})!r}"
    except UsageError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} instead of UsageError"


def _fixtures(model: nn.Module) -> dict[str, Any]:
    """What somebody may have hung onto each module and weight: numbers of hooks, and methods put over its own."""
    kinds = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    found: dict[str, Any] = {
        name: ([len(getattr(module, kind)) for kind in kinds], _patches(module), module.training)
        for name, module in model.named_modules()
    }
    for name, weight in model.named_parameters():
        hooks = (weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None))
        found[f"weight {name}"] = ([len(kept) for kept in hooks if kept], weight.requires_grad)
    return found


def _patches(module: nn.Module) -> dict[str, str]:
    """Methods put over the module's own, by who wrote them; the trainer itself puts some."""
    own = {key: value for key, value in vars(module).items() if callable(value) and not isinstance(value, type)}
    return {key: getattr(value, "__qualname__", type(value).__name__) for key, value in own.items()}


def _own_methods(kind: type[Strategy]) -> list[str]:
    """Public methods that are no hook."""
    own = [item for parent in kind.__mro__[: kind.__mro__.index(Strategy)] for item in vars(parent).items()]
    kinds = (FunctionType, classmethod, staticmethod, property)
    return [name for name, it in own if isinstance(it, kinds) and not name.startswith("_") and name not in HOOKS]
