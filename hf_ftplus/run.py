"""The story of one run: measure, fine-tune with strategies, measure again, say what was learnt and what was kept."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers.utils import logging as transformers_logging

from . import data
from .batches import DEFAULT_LENGTH
from .config import RunConfig
from .errors import DataError, FTPlusError, IncompatibleError, RetentionError, StorageError
from .evaluation import EvalTask, Evaluation, retention_gate, with_answers
from .generate import self_generate
from .model import cache
from .report import Report
from .trainer import STATE_FOLDER, SaveOnInterrupt, SFTTrainer, autocast, refuse, sft_trainer

HELD_OUT = 5
"""One row in so many of a protect set is measured and never used to protect."""
ANSWERED_TOGETHER = 16
NATIVE = ({"messages"}, {"prompt", "completion"}, {"input_ids"}, {"prompt"}, {"images"}, {"image"})
"""Columns that TRL itself understands; such learn data reaches it untouched."""

logger = logging.getLogger("hf_ftplus")


def sft(config: RunConfig) -> Report:
    """Fine-tune as the configuration says; print, save and return the report.

    Raises:
        FTPlusError: see the exit codes in `errors.py`; RetentionError when all is saved but too little was kept.
    """
    speak(config)
    seconds: dict[str, float] = {}
    with timed(seconds, "preparing"), no_empty_folder(config, unless_done=True):
        claim(config)
        trainer, tasks = prepare(config)
    evaluation = Evaluation(
        tasks,
        tokenizer_of(trainer),
        batch_size=config.training.per_device_eval_batch_size,
        seed=config.training.seed,
        completions=config.completions,
        autocast=autocast(trainer.args),
    )
    with timed(seconds, "measuring before"):
        evaluation.before(trainer.model)
    with timed(seconds, "training"):
        train(trainer, config)
    with timed(seconds, "saving"):
        trainer.save_model(config.training.output_dir)
    with timed(seconds, "measuring after"):
        results = evaluation.after(trainer.model)
    report = Report(results, facts(config, trainer, seconds))
    if trainer.is_world_process_zero():
        report.save(Path(config.training.output_dir) / STATE_FOLDER / "report.json")
        report.show()
    if config.training.push_to_hub:
        trainer.push_to_hub(dataset_name=config.script.dataset_name)
    trainer.end()
    lost = retention_gate(results, config.fail_if_retention_below) if config.fail_if_retention_below is not None else []
    if lost:
        raise RetentionError("\n".join(lost))
    return report


def preview(config: RunConfig) -> None:
    """`--dry-run`: resolve everything, show three rows with what is learnt in them, and what strategies will cost."""
    speak(config)
    with no_empty_folder(config):
        claim(config, probe=False)
        trainer, tasks = prepare(config)
        learn = trainer.train_dataset
        click.echo(f"model     {config.model.model_name_or_path}: {count(trainer)}")
        click.echo(f"learn     {len_of(learn)} rows, {share_supervised(learn):.0%} of tokens carry loss")
        for task in tasks:
            click.echo(f"measured  {task.name} ({task.role}): {len(task.rows)} rows")
        for row in show_rows(trainer, 3):
            click.echo(f"row       {row}")
        if trainer.ftplus is not None:
            run = trainer.ftplus.setup(trainer.model, trainer.args, trainer.processing_class, None)
            for strategy in trainer.ftplus.strategies:
                cost = trainer.ftplus.call(strategy, "preview", run)
                click.echo(f"strategy  {strategy!r}: {in_words(cost)}")
    click.echo(f"Dry run: nothing was trained, nothing written to {config.training.output_dir}.")


@contextmanager
def no_empty_folder(config: RunConfig, unless_done: bool = False) -> Iterator[None]:
    """The Trainer makes its folder at once; take an empty one away again that was not there before."""
    folder, done = Path(config.training.output_dir), False
    existed = folder.exists()
    try:
        yield
        done = True
    finally:
        if not existed and not (done and unless_done) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def prepare(config: RunConfig) -> tuple[SFTTrainer, list[EvalTask]]:
    """Data, then model and trainer with its strategies, then what will be measured; cheap refusals first."""
    refuse(config.strategies, config.training)
    learn, held_out = learn_rows(config)
    measured = {spec.name: data.load(spec.source, spec.split) for spec in config.measure if not spec.generate}
    protect = {spec.name: data.load(spec.source, spec.split) for spec in config.protect if not spec.generate}
    for name, rows in protect.items():
        if rows.column_names == ["prompt"]:
            raise DataError(
                f"--protect {name}: its rows are questions without completions, which say nothing about what to keep. "
                "Give rows with completions, or measure with them: --measure."
            )
    trainer = sft_trainer(config, learn, held_out)
    check_supervised(learn, trainer)
    if trainer.is_fsdp_enabled and (config.measure_rows or any(spec.generate for spec in config.protect)):
        raise IncompatibleError(
            "Under FSDP the model is not whole before training starts, so nothing can be measured or written by it. "
            "Type --measure-rows 0, and give protect data that exists instead of self:N."
        )
    for spec in (*config.protect, *config.measure):
        if spec.generate and (config.strategies or spec.name not in measured):
            (protect if spec in config.protect else measured)[spec.name] = written(spec, trainer, config)
    for name in list(protect):
        if name not in measured:
            protect[name], measured[name] = hold_out(protect[name], config.measure_rows)
    trainer.install(config.strategies, protect or None, config.memory)
    if "learn" not in measured and held_out is None:
        logger.warning("learn is measured on the rows it trains on; for held-out figures give --measure learn=DATA")
    if "learn" not in measured:
        measured["learn"] = held_out if held_out is not None else learn
    return trainer, list(eval_tasks(config, measured, trainer))


def eval_tasks(config: RunConfig, measured: dict[str, Any], trainer: SFTTrainer) -> Iterator[EvalTask]:
    """What is measured before and after: learn first, then protect, then the rest."""
    protect = [spec.name for spec in config.protect]
    order = ["learn", *protect, *(name for name in measured if name != "learn" and name not in protect)]
    tokenizer = tokenizer_of(trainer)
    for name in order if config.measure_rows else ():
        rows = measured[name]
        if not isinstance(rows, Dataset):
            logger.warning("%s is a stream and is not measured; give --measure %s=DATA.", name, name)
            continue
        field = config.training.dataset_text_field
        if name == "learn" and field != "text" and field in rows.column_names:
            rows = rows.select_columns([field]).rename_column(field, "text")
        rows = data.normalise(spread(rows, config.measure_rows), name)
        if rows.column_names == ["prompt"]:
            rows = answered(name, rows, trainer)
        role = "learn" if name == "learn" else "protect" if name in protect else "measure"
        yield EvalTask.of(
            name, role, rows, tokenizer, trainer.args.max_length or DEFAULT_LENGTH, config.metrics.get(name)
        )


def answered(name: str, questions: Dataset, trainer: SFTTrainer) -> Dataset:
    """Questions with the starting model's own greedy answers as the reference."""
    rows = with_answers(trainer.model, tokenizer_of(trainer), list(questions), batch_size=ANSWERED_TOGETHER)
    if not rows:
        raise DataError(
            f"{name}: the starting model answers none of the {len(questions)} questions, nothing to measure. "
            "Give rows with a completion, or a model that was trained to answer."
        )
    return Dataset.from_list(rows)


def learn_rows(config: RunConfig) -> tuple[Any, Dataset | None]:
    """The learn data as `trl sft` finds it (or a local file), and its test split if it has one."""
    script, mixture = config.script, config.mixture
    if mixture.datasets:
        from trl import get_dataset

        splits = get_dataset(mixture)
    elif Path(script.dataset_name).suffix in data.READERS:
        splits = {script.dataset_train_split: data.load(script.dataset_name)}
    else:
        try:
            splits = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        except Exception as error:  # whatever its readers, fsspec or the network raise
            raise DataError(f"--dataset_name {script.dataset_name}: {str(error).splitlines()[0]}") from error
    if script.dataset_train_split not in splits:
        raise DataError(
            f"{script.dataset_name} has no split {script.dataset_train_split!r}; it has {', '.join(splits)}."
        )
    train, test = splits[script.dataset_train_split], splits.get(script.dataset_test_split)
    return as_trl_reads(train, config), None if test is None else as_trl_reads(test, config)


def as_trl_reads(rows: Any, config: RunConfig) -> Any:
    """Rows in a format that TRL knows are left alone; alpaca and sharegpt become such."""
    columns = set(rows.column_names or ())
    known = any(native <= columns for native in NATIVE) or config.training.dataset_text_field in columns
    return rows if known or not isinstance(rows, Dataset) else data.normalise(rows, "learn")


def check_supervised(learn: Any, trainer: SFTTrainer) -> None:
    """Something must be left to learn from; what truncation dropped is said."""
    kept = trainer.train_dataset
    if not isinstance(kept, Dataset) or not isinstance(learn, Dataset):
        return
    if not len(kept) or share_supervised(kept) == 0:
        raise DataError(
            f"learn: none of {len(learn)} rows has a supervised token left after truncation to max_length "
            f"{trainer.args.max_length}. Type a larger --max_length."
        )
    if len(kept) < len(learn) and not trainer.args.packing:
        logger.warning(
            "learn: %d of %d rows lost all supervised tokens to truncation.", len(learn) - len(kept), len(learn)
        )


def written(spec: data.TaskSpec, trainer: SFTTrainer, config: RunConfig) -> Dataset:
    """Rows that the starting model writes itself; the first process does, the others read its cache."""
    with trainer.args.main_process_first(local=False):
        return self_generate(
            trainer.model, tokenizer_of(trainer), spec.generate, seed=config.training.seed, cache=cache() / "self"
        )


def hold_out(rows: Dataset, most: int) -> tuple[Dataset, Dataset]:
    """(rows that protect, rows that are measured): every fifth row, at most `most`; too few rows serve as both."""
    measured = min(most, len(rows) // HELD_OUT)
    if not measured:
        return rows, rows
    chosen = set(places(len(rows), measured))
    return rows.select([i for i in range(len(rows)) if i not in chosen]), rows.select(sorted(chosen))


def spread(rows: Dataset, most: int) -> Dataset:
    """At most `most` rows, evenly over the whole."""
    return rows if len(rows) <= most else rows.select(places(len(rows), most))


def places(length: int, count: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def train(trainer: SFTTrainer, config: RunConfig) -> None:
    """Train, or go on from a checkpoint. Ctrl-C finishes the step, saves, and is raised again."""
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=resume_point(config))
    except FTPlusError:
        if trainer.state.global_step >= trainer.state.max_steps > 0:  # trained to the end: what failed came after it
            trainer.save_model(config.training.output_dir)
        raise
    except KeyboardInterrupt:
        step = trainer.state.global_step
        if interrupt.asked and (Path(config.training.output_dir) / f"checkpoint-{step}").is_dir():
            click.echo(
                f"Saved checkpoint-{step}. Go on with the same command and --resume_from_checkpoint true.", err=True
            )
        raise
    finally:
        interrupt.restore()


def resume_point(config: RunConfig) -> str | bool | None:
    """`true` and `false` as words, a path as it is."""
    given = config.training.resume_from_checkpoint
    word = str(given).lower()
    if given is None or word == "false":
        return None
    if word == "true":
        folder = Path(config.training.output_dir)
        if not any(folder.glob("checkpoint-*")):
            raise StorageError(
                f"--resume_from_checkpoint true: {folder} holds no checkpoint-N. Leave the flag out to start."
            )
        return True
    if not Path(given).is_dir():
        raise StorageError(
            f"--resume_from_checkpoint {given}: no such folder; expected a checkpoint-N folder, or true."
        )
    return given


def claim(config: RunConfig, probe: bool = True) -> None:
    """The output folder must be writable and not hold another run.

    Raises:
        StorageError: it is neither; says how to go on.
    """
    folder = Path(config.training.output_dir)
    found = [*folder.glob("checkpoint-*"), *folder.glob(f"{STATE_FOLDER}/report.json")]
    if found and resume_point(config) is None:
        raise StorageError(
            f"{folder} holds another run ({found[0].relative_to(folder)}). Go on: --resume_from_checkpoint true. "
            "Or choose another --output_dir."
        )
    if not probe:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".ftplus-{platform.node()}-{time.monotonic_ns()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise StorageError(f"--output_dir {folder} cannot be written: {error.strerror}. Choose another.") from None


def facts(config: RunConfig, trainer: SFTTrainer, seconds: dict[str, float]) -> dict[str, Any]:
    """What the report says beside the figures: how the run was made and what it cost."""
    return {
        "command": ["ftplus", *without_secrets(sys.argv[1:])],
        "config": config.resolved(),
        "versions": versions(),
        "seed": config.training.seed,
        "steps": trainer.state.global_step,
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
        "seconds": seconds,
        "strategies": {} if trainer.ftplus is None else strategy_facts(trainer),
    }


def without_secrets(words: list[str]) -> list[str]:
    """A command line with the value after every `--...token` flag masked."""
    masked, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        masked.append("***" if secret else f"{name}=***" if equals and name.endswith("token") else word)
        secret = not equals and name.startswith("--") and name.endswith("token")
    return masked


def strategy_facts(trainer: SFTTrainer) -> dict[str, dict[str, Any]]:
    """Seconds, bytes of state and last figures of each strategy."""
    logged = {key: value for log in trainer.state.log_history for key, value in log.items()} | trainer.ftplus.metrics()
    held = trainer.ftplus.bytes()
    return {
        name: {"seconds": round(spent, 2), "bytes": held[name]}
        | {key.removeprefix(f"{name}/"): value for key, value in logged.items() if key.startswith(f"{name}/")}
        for name, spent in trainer.ftplus.seconds.items()
    }


def versions() -> dict[str, str]:
    """Of everything that shapes the result, plugins included."""
    from .plugins import discover

    names = ["hf-ftplus", "torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    found = {name: metadata.version(name) for name in names}
    plugins = {plugin.distribution: plugin.version for plugin in discover() if plugin.distribution}
    return {"python": platform.python_version(), **found, **{k: v for k, v in plugins.items() if k not in found}}


def show_rows(trainer: SFTTrainer, most: int) -> Iterator[str]:
    """Rows as the model sees them, with what is learnt in them between «»."""
    tokenizer = tokenizer_of(trainer)
    dataset = trainer.train_dataset
    for row in (
        [dataset[i] for i in range(min(most, len(dataset)))] if isinstance(dataset, Dataset) else dataset.take(most)
    ):
        text, inside = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if (label != -100) != inside:
                text, inside = text + ("»" if inside else "«"), not inside
            text += data.escape(tokenizer.decode([token]), 1000)
        yield text + ("»" if inside else "")


def share_supervised(dataset: Any) -> float:
    """Share of tokens that carry loss, over the first thousand rows that have any, else over all."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return float("nan")
    for rows in (dataset.select(range(min(1000, len(dataset)))), dataset):
        labels = [label for row in rows["labels"] for label in row]
        if any(label != -100 for label in labels):
            return sum(label != -100 for label in labels) / len(labels)
    return 0.0


def in_words(cost: dict[str, float]) -> str:
    """The cost preview of a strategy as a phrase."""
    if not cost:
        return "no cost stated"
    start = f"about {cost['seconds']:.0f} s before the first step"
    return f"{cost['bytes'] / 1e6:.1f} MB of state, {cost['rows']:.0f} protect rows, {start}"


def count(trainer: SFTTrainer) -> str:
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in trainer.model.parameters())
    return f"{total / 1e6:.1f} M weights, {trained / 1e6:.1f} M trained, on {trainer.args.device}"


def len_of(dataset: Any) -> str:
    return str(len(dataset)) if hasattr(dataset, "__len__") else "streamed"


def tokenizer_of(trainer: SFTTrainer) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def speak(config: RunConfig) -> None:
    """Show our own progress on stderr, on the first process."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO if config.training.process_index == 0 else logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
        config.training.disable_tqdm = True
    if config.training.parallel_mode.value == "not_distributed" and config.training.n_gpu > 1:
        raise IncompatibleError(
            f"{config.training.n_gpu} devices and one process. Type the same command with --num_processes "
            f"{config.training.n_gpu}, or choose one device: CUDA_VISIBLE_DEVICES=0."
        )


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 2)
