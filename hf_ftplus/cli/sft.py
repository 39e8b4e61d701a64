"""`ftplus sft`: every flag and YAML key of `trl sft`, read by TRL's own parser, and ours beside them.

Replacing `trl` by `ftplus` in a command never breaks it. Flags of `accelerate launch` (`--num_processes 8`,
`--accelerate_config fsdp2`) start the same command again under accelerate, as `trl sft` does.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import compat
from ..config import OPTIONS, YAML_ONLY, Option, RunConfig, build, merge, read_yaml
from ..errors import IncompatibleError, MissingPluginError, UsageError, nearest
from . import launch
from .doctor import cpu_bf16_units

CALLED = {
    "lr": "learning_rate",
    **dict.fromkeys(("batch", "batch_size", "bs", "train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("strategy", "strategies", "method"), "plugin"),
    **dict.fromkeys(("output", "out"), "output_dir"),
    **dict.fromkeys(("learn", "data", "dataset", "train_file"), "dataset_name"),
    "steps": "max_steps",
}
"""What other programs call it -> what it is called here."""

TEXTS = (
    *("model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_train_split"),
    *("dataset_test_split", "dataset_text_field", "output_dir", "chat_template_path", "run_name", "hub_model_id"),
)
"""Keys of TRL that are text; its parser takes whatever YAML holds."""


class Sft(click.Command):
    """Keeps the words of the command line, to give them again to the processes it launches."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = [_as_trl_says(word) for word in args]
        return super().parse_args(ctx, list(ctx.meta["words"]))  # which takes its list apart

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from .completion import beginning, flags_of_trl

        return [*super().shell_complete(ctx, incomplete), *beginning(flags_of_trl(), incomplete)]


def _as_trl_says(word: str) -> str:
    """--model is what our other commands call a model."""
    name, equals, value = word.partition("=")
    return f"--model_name_or_path{equals}{value}" if name == "--model" else word


def with_options(options: Sequence[Option]) -> Callable[[Any], Any]:
    """Ours, as click has them, in their order."""

    def added(command: Any) -> Any:
        for it in reversed(options):
            how = {"multiple": it.many, "type": it.kind, "metavar": it.metavar, "help": it.help}
            command = click.option(it.flag, it.name, **how)(command)
        return command

    return added


@click.command(
    cls=Sft,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@with_options(OPTIONS)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML of any of these options, ours and TRL's, and of tasks (`ftplus data --help`). Flags win.",
)
@click.option("--dry-run", is_flag=True, help="Resolve everything, show three rows and the cost, train nothing.")
@click.option(
    "--as-if",
    metavar="model=CONFIG,world=N,sharding=fsdp2",
    help="With --dry-run: the plan on N ranks for a model of which only the config is read; no data is needed.",
)
@click.option("--help-all", is_flag=True, help="Also list every flag of `trl sft`.")
@click.pass_context
def sft(
    ctx: click.Context, config_file: str | None, dry_run: bool, as_if: str | None, help_all: bool, **flags: Any
) -> None:
    """Fine-tune as `trl sft` does, and keep what the model knows.

    \b
    ftplus sft --plugin ewc --model demo --dataset_name learn.jsonl --protect old.jsonl --max_grad_norm 0
    """
    if help_all:
        click.echo(ctx.get_help())
        _trl_parser().print_help()
        return
    if as_if is not None:
        if not dry_run:
            raise UsageError("--as-if plans a run and trains nothing. Type --dry-run as well.")
        from ..as_if import AsIf, plan

        asked = AsIf.parse(as_if)
        words = ctx.args if not asked.model else [*ctx.args, "--model_name_or_path", asked.model]
        plan(configured(flags, words, take_environment(read_yaml(config_file)), no_data=True)[0], asked)
        return
    config, launch_yaml, launch_words = configured(flags, ctx.args, take_environment(read_yaml(config_file)))
    if not launch.launched():
        asked = [*launch_yaml, *launch_words]
        named = [word for word in asked if word not in ("--quiet", "-q")]  # of how a launch reports, if there is one
        why = "" if named else launch.expected(config.training.use_cpu)
        if why:
            click.echo(f"Launching through accelerate, as `trl sft` does: {why}.", err=True)
        if named or why:
            again = [*(["--debug"] if ctx.find_root().obj else []), "sft", *_without(ctx.meta["words"], launch_words)]
            launch.start(asked, again, config.strategies, launch.precision_of(config.training))
            return
    if dry_run:
        from ..preview import dry_run as begin
    else:
        from ..run import sft as begin
    begin(config)


def configured(
    flags: dict[str, Any], words: Sequence[str], yaml: dict[str, Any], no_data: bool = False
) -> tuple[RunConfig, list[str], list[str]]:
    """One run from our flags, the other words of the command line and a YAML mapping; and what is accelerate's."""
    compat.quiet()  # a sequence comes here without a command line
    ours, rest = merge(flags, yaml)
    config = _built(ours, words, rest)
    trl, launch_yaml, launch_words = parse_trl(words, rest, bool(config.tasks), no_data)
    if config.memory is not None:
        from ..shared.base import check_form

        check_form(config.memory, adapter=trl["model"].use_peft)
    return replace(config, **trl), launch_yaml, launch_words


def _built(ours: dict[str, Any], words: Sequence[str], yaml: dict[str, Any]) -> RunConfig:
    """`build`; of a plugin that is not there, and that the run was begun with, the version is named."""
    try:
        return build(ours)
    except MissingPluginError as error:
        output = _value(words, "output_dir") or yaml.get("output_dir")
        if not output:
            raise
        from ..state import missing_plugin

        if said := missing_plugin(Path(str(output)), error.name):
            raise IncompatibleError(f"{error} {said}") from error
        raise


def _value(words: Sequence[str], name: str) -> str | None:
    """What follows the last `--name` among words that are not parsed yet."""
    pairs = zip(words, [*words[1:], ""], strict=False)
    found = [
        word.partition("=")[2] or after
        for word, after in pairs
        if word.partition("=")[0].replace("-", "_") == f"__{name}"
    ]
    return found[-1] if found else None


def parse_trl(
    words: Sequence[str], yaml: dict[str, Any], tasks: bool = False, no_data: bool = False
) -> tuple[dict[str, Any], list[str], list[str]]:
    """TRL's argument objects from its flags and YAML keys, and what of YAML and of the words is accelerate's.

    Args:
        words: of the command line.
        yaml: what TRL and accelerate may find in it.
        tasks: whether what is learnt is declared under `tasks:`.
        no_data: nothing will be trained here, so there may be nothing to learn.

    Raises:
        UsageError: a flag or key that neither knows, with the nearest one that they do; or a bad value.
        IncompatibleError: a flag asks for a package that is not installed.
    """
    parser = _trl_parser()
    _check_yaml(yaml, parser)
    for_launch = launch.as_typed(parser.set_defaults_with_config(**yaml))
    use_cpu = parser.parse_known_args(list(words))[0].use_cpu
    parser.set_defaults(**_that_work_here([*words, *(f"--{key}" for key in yaml)], use_cpu, trains=not no_data))
    try:
        script, training, model, mixture, left = parser.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error}") from error
    except ImportError as error:  # of what a flag asks for, such as deepspeed
        raise IncompatibleError(f"{' '.join(str(error.args[0]).split())} Install it, or leave the flag out.") from error
    _check_words(left, parser)
    for key in ("seed", "data_seed"):
        value = getattr(training, key)
        if value is not None and (type(value) is not int or not 0 <= value < 2**32):
            raise UsageError(f"{key} is {value!r}; expected a whole number from 0 to {2**32 - 1}.")
    _check_numbers(training)
    if str(training.resume_from_checkpoint).lower() == "false":  # a word that the Trainer would take for a folder
        training.resume_from_checkpoint = None
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        model.lora_target_modules = [model.lora_target_modules]  # TRL unpacks one name, and PEFT takes it for a pattern
    _check_what_is_learnt(script, mixture, tasks, no_data)
    if not model.model_name_or_path:
        raise UsageError("There is no model. Type --model_name_or_path NAME_OR_PATH, or demo for the embedded one.")
    return {"script": script, "training": training, "model": model, "mixture": mixture}, for_launch, left


def _check_what_is_learnt(script: Any, mixture: Any, tasks: bool, no_data: bool) -> None:
    """It is said once, and nothing is said of what is not there."""
    learn = {"dataset_name": script.dataset_name, "datasets": mixture.datasets, "tasks": tasks}
    if not any(learn.values()) and not no_data:
        raise UsageError(
            "There is nothing to learn: no --dataset_name, and no tasks or datasets in YAML. Type --dataset_name "
            "FILE_OR_HUB."
        )
    if mixture.datasets and script.dataset_name:
        raise UsageError("datasets and dataset_name both say what to learn; expected one of them.")
    if not mixture.datasets and (mixture.streaming or mixture.test_split_size is not None):
        idle = "streaming" if mixture.streaming else "test_split_size"
        instead = {"streaming": "--dataset_streaming true, or streaming: true in a task"}
        raise UsageError(
            f"{idle} is of `datasets:` in YAML, and there is none. Leave it out, and type "
            f"{instead.get(idle, '--dataset_test_split NAME, or measure: DATA in a task')}."
        )
    if tasks and (other := next((name for name in ("dataset_name", "datasets") if learn[name]), "")):
        raise UsageError(f"tasks and {other} both say what to learn; expected one of them. Leave {other} out.")


def _check_numbers(training: Any) -> None:
    """What nobody means, and what PyTorch would say in a traceback, or not at all."""
    wanted = {
        "learning_rate": (0 <= training.learning_rate < float("inf"), "0 or above"),
        "per_device_train_batch_size": (training.per_device_train_batch_size > 0, "1 or above"),
        "per_device_eval_batch_size": (training.per_device_eval_batch_size > 0, "1 or above"),
        "gradient_accumulation_steps": (training.gradient_accumulation_steps > 0, "1 or above"),
        "num_train_epochs": (training.num_train_epochs > 0 or training.max_steps > 0, "above 0, or nothing is trained"),
        "max_steps": (training.max_steps != 0, "above 0, or -1 for --num_train_epochs; 0 trains nothing"),
    }
    for name, (fits, expected) in wanted.items():
        if not fits:
            raise UsageError(f"--{name} is {getattr(training, name)}; expected {expected}.")


def take_environment(yaml: dict[str, Any]) -> dict[str, Any]:
    """Set the variables under `env:`, before the libraries that read them are imported; the rest of the mapping."""
    variables = yaml.get("env") or {}
    if not isinstance(variables, dict):
        raise UsageError(f"env: {variables!r} in the YAML file; expected a mapping of NAME: value.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return {key: value for key, value in yaml.items() if key != "env"}


def _trl_parser() -> Any:
    from trl.scripts.sft import make_parser

    parser = make_parser(prog="ftplus sft")
    parser.error = _usage_error  # argparse would print its own usage and exit
    return parser


def _usage_error(message: str) -> None:
    typed = message.removeprefix("ambiguous option: ").partition(" could match")[0]
    if typed != message:
        raise UsageError(f"Unknown flag {typed}.{_meant(typed)} See `ftplus sft --help-all`.")
    raise UsageError(f"{message}. See `ftplus sft --help-all`.")


def _meant(name: str, known: Sequence[str] = ()) -> str:
    """The flag that is meant by what other programs call it, else the nearest."""
    usual = CALLED.get(name.lstrip("-").replace("-", "_"))
    return f" Did you mean '--{usual}'?" if usual else nearest(name, known)


def _that_work_here(given: Sequence[str], use_cpu: bool, trains: bool) -> dict[str, Any]:
    """Defaults that this machine can run, where the user said nothing: no GPU means CPU, no bf16 means fp32."""
    import torch

    def said(*names: str) -> bool:
        return any(word.partition("=")[0] == f"--{name}" for word in given for name in names)

    defaults: dict[str, Any] = {}
    cpu = not torch.accelerator.is_available()
    if cpu and not said("use_cpu"):
        defaults["use_cpu"] = True
    if trains and not has_bf16(on_cpu=cpu or use_cpu) and not said("bf16", "fp16"):
        defaults["bf16"] = False
        click.echo("This machine has no bf16; training in fp32 (say --bf16 true or --fp16 true to choose).", err=True)
    return defaults


def has_bf16(on_cpu: bool) -> bool:
    """Whether bf16 is faster here than fp32, not merely possible."""
    import torch

    if on_cpu:
        return bool(cpu_bf16_units())
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def yaml_keys(parser: Any = None) -> list[str]:
    """Every key that YAML may have: ours, TRL's and accelerate's."""
    ours, parser = [option.yaml for option in OPTIONS], parser or _trl_parser()
    return [*ours, *YAML_ONLY, *(action.dest for action in parser._actions), "env", *launch.flags()]


def _check_yaml(yaml: dict[str, Any], parser: Any) -> None:
    known = yaml_keys(parser)
    for key in yaml:
        if key == "stages":
            raise UsageError("The YAML file has stages, and this command runs one. Type ftplus sequence FILE.")
        if key not in known:
            raise UsageError(f"Unknown key {key!r} in the YAML file.{nearest(key, known)} See `ftplus sft --help-all`.")
    lists = [action.dest for action in parser._actions if action.type is str and action.nargs == "+"]
    for key in (*TEXTS, *lists):
        value = yaml.get(key)
        parts = value if key in lists and isinstance(value, list) else [value]
        if value is not None and not all(isinstance(part, str) for part in parts):
            raise UsageError(
                f"{key}: {value!r} in the YAML file; expected text{' or a list of it' * (key in lists)}. Write it in "
                f"quotes: {key}: '{value}'"
            )


def _check_words(words: Sequence[str], parser: Any) -> None:
    accelerate, ctx = launch.flags(), click.get_current_context(silent=True)
    own = [flag for param in (ctx.command.params if ctx else ()) for flag in param.opts]
    known = ["--config", *(option.flag for option in OPTIONS), *own, *(f"--{name}" for name in accelerate)]
    help_of = "ftplus sft --help-all" if ctx is None or ctx.info_name == "sft" else f"{ctx.command_path} --help"
    known += [flag for action in parser._actions for flag in action.option_strings]
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.startswith("--") and "." in name:
            value = value or "".join(words[place + 1 : place + 2])
            raise UsageError(f"Unknown flag {name}. {_as_setting(name[2:], value)}")
        if name.startswith("--") and name[2:].replace("-", "_") not in accelerate:
            raise UsageError(f"Unknown flag {name}.{_meant(name, known)} See `{help_of}`.")
    if words and not words[0].startswith("-"):
        raise UsageError(f"Unexpected {words[0]!r}; every value needs a flag before it. See `ftplus sft --help`.")


def _as_setting(path: str, value: str) -> str:
    """What to type for `--ewc.lam 0.4`: the setting of this name, the nearest, or how strong it is."""
    from ..plugins import load
    from ..strategy import settings

    plugin, _, wanted = path.rpartition(".")
    known = [item.name for item in settings(load(plugin))]
    close = difflib.get_close_matches(wanted, known, n=1)
    meant = close[0] if close else "strength" if "strength" in known else "SETTING"
    typed = f"--set {plugin}.{meant}={value or 'VALUE'}"
    return f"A setting of a strategy is given so: {typed}. All: ftplus plugins {plugin}."


def _without(words: list[str], taken: list[str]) -> list[str]:
    """`words` less `taken`, which stand among them in the same order."""
    waiting, kept = list(taken), []
    for word in words:
        if waiting and word == waiting[0]:
            waiting.pop(0)
        else:
            kept.append(word)
    return kept
