"""Start `ftplus sft` again under accelerate, as `trl sft` does, and end as its processes (ranks) ended.

accelerate and torchrun turn whatever a rank exits with into 1 and a page of traceback. So every rank leaves its exit
code and its one sentence in a folder of this process, which says the sentence once and exits with the code. Ctrl-C and
SIGTERM reach this process alone, as torchrun gives each rank a session of its own: they are passed on, and the ranks
have all the time they need to save.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

import click
import psutil

from ..config import read_yaml
from ..errors import IncompatibleError, UsageError, nearest
from . import RANKS

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from ..strategy import Strategy

Endings = list[tuple[int, str]]
"""Exit code and sentence of each rank that left any, lowest rank first."""


def parser() -> ArgumentParser:
    """The parser of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    found = launch_command_parser()
    found.error = _usage_error  # argparse would print its own usage and exit
    return found


def _usage_error(message: str) -> None:
    raise UsageError(f"accelerate launch: {message}. See `accelerate launch --help`.")


def flags() -> set[str]:
    """Every flag of `accelerate launch`, with underscores, and TRL's name for a config file."""
    found = (flag for action in parser()._actions for flag in action.option_strings)
    return {flag.lstrip("-").replace("-", "_") for flag in found if flag.startswith("--")} | {"accelerate_config"}


def as_typed(pairs: Sequence[str]) -> list[str]:
    """Flags and values that stood in YAML, as accelerate's parser wants them: a switch such as --use_fsdp has no value.

    Raises:
        UsageError: a switch is neither true nor false.
    """
    switches = {flag for action in parser()._actions if action.nargs == 0 for flag in action.option_strings}
    words: list[str] = []
    for flag, value in zip(pairs[::2], pairs[1::2], strict=True):
        if flag in switches and value not in ("True", "False"):
            raise UsageError(f"{flag[2:]}: {value} in the YAML file; expected true or false.")
        words += [flag] * (value == "True") if flag in switches else [flag, value]
    return words


def launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def expected(use_cpu: bool) -> str:
    """Why `trl sft` would start other processes here without being asked; empty where one process does it all.

    `trl sft` always goes through `accelerate launch`, which takes the user's own configuration if there is one, else
    every device that it finds.
    """
    import torch

    if file := _own_config():
        return f"accelerate's configuration {file}"
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() and not use_cpu else 1
    return f"{devices} devices (CUDA_VISIBLE_DEVICES=0 keeps to one)" if devices > 1 else ""


def _own_config() -> Path | None:
    """What `accelerate config` left, if anything."""
    from accelerate.commands.config.config_args import default_config_file

    file = Path(default_config_file)
    return file if os.path.isfile(file) else None  # nor where it may not be looked for


def start(
    launch: Sequence[str], words: Sequence[str], strategies: Sequence[Strategy], precision: str | None = None
) -> None:
    """Run `ftplus WORDS` under `accelerate launch LAUNCH` and wait for its end.

    Args:
        launch: words for accelerate.
        words: for `ftplus`.
        strategies: of the run.
        precision: no, bf16 or fp16, as the Trainer was told; None where there is none.

    Raises:
        UsageError: accelerate refuses its flags.
        IncompatibleError: a launch with DeepSpeed ZeRO-3, under which a strategy cannot act.
        click.ClickException: a rank failed; it has the rank's exit code and says what the rank said.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    crash = 0, ""
    with tempfile.TemporaryDirectory(prefix="ftplus-") as folder, _passing_on() as asked:
        try:
            args = parser().parse_args([*_resolved([*map(str, launch)]), "--module", "hf_ftplus", *words])
            _look_at_configuration(args, strategies, precision)
            args.multi_gpu = args.multi_gpu or _silently_one(args)
            args.signals_to_handle = "SIGHUP,SIGQUIT"  # torchrun, where it knows this, kills 30 s after passing one on
            _hush_torchrun()
            with patch_environment(**{RANKS: folder}):
                launch_command(args)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(f"accelerate launch: {error}") from None
        except ImportError as error:  # of what a flag asks for, such as deepspeed
            raise IncompatibleError(f"accelerate launch: {str(error).rstrip('.')}.") from None
        except CalledProcessError as error:  # one process, without torchrun
            crash = error.returncode, f"the process ended with {error.returncode}"
        except SystemExit as error:  # the same under --quiet
            crash = int(error.code or 0), f"the process ended with {error.code}"
        except ChildFailedError as error:
            first = next(iter(error.failures.values()))  # as they were noticed: others may have died of this one
            crash = first.exitcode, f"process {first.local_rank} ended with {first.exitcode}: {first.message}"
        except SignalException as error:
            crash = -error.sigval, "interrupted"
        code, sentence = ending(_left(Path(folder)), crash, asked[0] if asked else 0)
    if code:
        failed = click.ClickException(sentence)
        failed.exit_code = code
        raise failed


def _resolved(launch: list[str]) -> list[str]:
    """With the file of the last `--accelerate_config NAME`, as TRL finds it: flags stand behind what YAML says."""
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    names, rest, words = [], [], iter(launch)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == "__accelerate_config":
            names.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    name = "".join(names[-1:])
    try:
        return resolve_accelerate_config_argument(["--accelerate_config", name, *rest]) if names else rest
    except ValueError:
        known = sorted(file.name[:-5] for file in files("trl.accelerate_configs").iterdir() if file.suffix == ".yaml")
        raise UsageError(
            f"--accelerate_config {name}: no file, and none of TRL's own ({', '.join(known)}).{nearest(name, known)}"
        ) from None


def precision_of(args: Any) -> str:
    """What a Trainer's arguments say of its precision, in accelerate's words."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


# ---- how it ended ----------------------------------------------------------------------------------------------------


def _left(folder: Path) -> Endings:
    files = sorted(folder.iterdir(), key=lambda file: int(file.name))
    return [tuple(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def ending(said: Endings, crash: tuple[int, str], asked: int = 0) -> tuple[int, str]:
    """Exit code and sentence of the whole: from what the ranks said, what the launcher noticed, and a signal passed on.

    A rank that a signal killed (-9: out of memory) explains what others then say of lost connections; a code of ours
    says more than 1; and only ranks that say so have succeeded, since accelerate swallows errors under `debug: true`.
    """
    if asked and (not said or 128 + asked in [code for code, _ in said]):
        return 128 + asked, "interrupted"
    if crash[0] < 0:
        return 128 - crash[0], crash[1]
    failed = sorted((item for item in said if item[0]), key=lambda item: item[0] == 1)  # stable: the lowest rank first
    if failed or (said and not crash[0]):
        return failed[0] if failed else (0, "")
    return crash[0] or 1, crash[1] or "no process said how it ended"


# ---- signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def _passing_on() -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the ranks and wait on; a second Ctrl-C kills them. Gives what was passed on."""
    from ..interrupt import ONE_PRESS

    asked: list[int] = []
    since = 0.0

    def tell(number: int, frame: Any) -> None:
        nonlocal since
        stop_at_once = number == signal.SIGINT and bool(asked) and time.monotonic() - since > ONE_PRESS
        ranks = psutil.Process().children(recursive=stop_at_once)
        if not ranks:  # not started yet, or all gone
            raise KeyboardInterrupt(128 + number)
        since = since or time.monotonic()
        asked.append(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill() if stop_at_once else rank.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # torchrun sets the last two and leaves them set
    before = {number: signal.getsignal(number) for number in (getattr(signal, name, None) for name in names) if number}
    signal.signal(signal.SIGINT, tell)
    signal.signal(signal.SIGTERM, tell)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hush_torchrun() -> None:
    """What torchrun logs about a failed rank says less than the rank's own sentence."""
    import torch.distributed.run  # noqa: F401 - its loggers set their own levels when they are made

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _silently_one(args: Namespace) -> bool:
    """Whether accelerate would start one process where several are asked for: on CPUs, unless told what they are."""
    import torch

    told = (args.use_deepspeed, args.use_fsdp, args.tpu, args.config_file, args.mpirun_hostfile, _own_config())
    return (args.num_processes or 1) > 1 and not any(told) and not torch.accelerator.is_available()


def _look_at_configuration(args: Namespace, strategies: Sequence[Strategy], precision: str | None) -> None:
    """Refuse what DeepSpeed would, before any process is launched and not once per rank; and say in the Trainer's words
    what precision there is: TRL's configurations say bf16 also where there is none, and DeepSpeed wants both alike.
    """
    file = args.config_file or _own_config()
    said = read_yaml(str(file), "accelerate's --config_file") if file else {}
    if not args.use_deepspeed and said.get("distributed_type") != "DEEPSPEED":
        if args.mixed_precision is None and (precision, said.get("mixed_precision")) == ("no", "bf16"):
            args.mixed_precision = "no"
        return
    from ..strategy import refuse_deepspeed

    stage = (said.get("deepspeed_config") or {}).get("zero_stage", 2)  # accelerate's own default
    refuse_deepspeed(list(strategies), int(stage if args.zero_stage is None else args.zero_stage))
    if precision is None:
        return
    if args.mixed_precision not in (None, precision):
        raise UsageError(
            f"--mixed_precision is {args.mixed_precision}, and the Trainer trains in {precision}; DeepSpeed wants both "
            "alike. Leave it out, and type --bf16 true or --fp16 true."
        )
    args.mixed_precision = precision
