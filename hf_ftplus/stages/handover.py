"""What a stage is given by those before it, and what it leaves: model, memory, and a pool of its rows.

A stage starts from the model of the one before. An adapter is merged into its base first, and the next stage makes a
fresh one: what was learnt is then part of the weights, whatever the next stage trains. Memory (EWC, SI) of the stage
before goes to strategies of the same name; pools of all stages before are protect tasks by the names of their stages.
EWC adds up what memory and pools say, so that a task with a pool counts again in each later stage; its `decay` weighs
the memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from ..chosen import strategies as chosen
from ..conditions import RETENTION
from ..config import merge
from ..data import load
from ..errors import StorageError, UsageError
from ..specs import distinct_names, parse_all
from ..strategy import Strategy, settings
from .gathered import told
from .plan import KEEP, MERGED, Plan, Stage

RESTS: dict[str, dict[str, Any]] = {"ewc": {"first": True}, "replay": {"share": 0.0}}
"""Strategies that look back, and the settings with which they go through a first stage that has nothing behind it."""
JUDGES = ("fail_if_retention_below", "stop_when")
"""Keys that may judge protect data; above `stages:` they are for the stages that have some."""
ADAPTED = {"lora_target_modules": "PEFT's choice", "lora_target_parameters": [], "lora_modules_to_save": []}
"""Keys that say what an adapter trains, and what they mean where they are left out."""
TOLERANCE = 0.1
"""How far rounding may move the logits of what is handed on, as a part of how far the adapter did."""
LOOKED_AT = ("plugins", "set", "protect", "metric", "no_plugin")


def look_back(plan: Plan, stage: Stage) -> None:
    """Find out which strategies are given memory, and which have nothing to look back on; nor has a gate, then.

    Raises:
        UsageError: a later stage whose strategy would find nothing; or only some of several would find their memory.
    """
    ours, found = _strategies(stage)
    before = plan.before(stage)
    if before and _fits(before, stage):
        stage.remembers = _remembering(found, before)
    elif before and (lost := [strategy.name for strategy in found if _remembers_too(strategy, before)]):
        plan.notes.append(
            f"{stage.name} does not train all that {before.name} trains (use_peft, {', '.join(ADAPTED)}), so what "
            f"{', '.join(lost)} remembers of {before.name} is not used."
        )
    _note_forgotten(plan, stage, found)
    protect = bool(ours.get("protect")) or any(task.role == "protect" for task in stage.tasks)
    behind = protect or bool(before and plan.keep)
    memory = [*stage.remembers, *(["ewc"] if stage.number == 1 and "memory" in stage.yaml else [])]
    if not behind:
        _judge_nothing(plan, stage)
    stage.rests = [s.name for s in found if s.name in RESTS and not behind and s.name not in memory]
    if stage.rests and before:
        raise UsageError(
            f"{', '.join(stage.rests)} would find nothing to protect: keep is 0, there is no protect data, and "
            f"{before.name!r} leaves no memory that fits. Type keep: {KEEP}, or protect: self:256"
        )


def _note_forgotten(plan: Plan, stage: Stage, found: list[Strategy]) -> None:
    """Memory is of the model that it was left with: a stage without the strategy ends what it remembered."""
    before = plan.before(stage)
    for strategy in found if before else ():
        earlier = [it.name for it in plan.stages[: before.number - 1] if _remembers_too(strategy, it)]
        if earlier and not _remembers_too(strategy, before):
            plan.notes.append(
                f"{stage.name}: {strategy.name} remembers nothing of {', '.join(earlier)}, for {before.name} is "
                f"trained without it. Give it to {before.name}, too."
            )


def _judge_nothing(plan: Plan, stage: Stage) -> None:
    """Leave out what would judge protect data in every stage, where there is none yet, but not what the stage says."""
    for key in JUDGES:
        if key in stage.own or stage.yaml.get(key) is None:
            continue
        given = stage.yaml[key] if isinstance(stage.yaml[key], list) else [stage.yaml[key]]
        left = [item for item in given if key == "stop_when" and not str(item).strip().startswith(RETENTION)]
        if len(left) < len(given):
            del stage.yaml[key]
            stage.yaml |= {key: left} if left else {}
            plan.notes.append(f"{key} does not judge {stage.name}, where there is nothing to protect yet.")


def _fits(before: Stage, stage: Stage) -> bool:
    """Whether a stage trains all that the one before trained, so that its memory has a place for everything."""
    if not before.yaml.get("use_peft") and not stage.yaml.get("use_peft"):
        return True
    if not (before.yaml.get("use_peft") and stage.yaml.get("use_peft")):
        return False
    pairs = [[_listed(it.yaml.get(key) or unsaid) for it in (before, stage)] for key, unsaid in ADAPTED.items()]
    return all(was <= now or now == {"all-linear"} for was, now in pairs)


def _listed(value: Any) -> set[Any]:
    return set(value) if isinstance(value, list) else {value}


def _remembers_too(strategy: Strategy, before: Stage) -> bool:
    return strategy.overrides("finish") and strategy.name in [other.name for other in before.config.strategies]


def _strategies(stage: Stage) -> tuple[dict[str, Any], list[Strategy]]:
    """Our options that say what protects and how, and the strategies of these."""
    ours, _ = merge({}, {key: stage.yaml[key] for key in LOOKED_AT if key in stage.yaml})
    return ours, chosen(ours)


def _remembering(found: list[Strategy], before: Stage) -> list[str]:
    names = [strategy.name for strategy in found if strategy.overrides("finish")]
    left = [strategy.name for strategy in before.config.strategies if strategy.overrides("finish")]
    kept, lost = [name for name in names if name in left], [name for name in names if name not in left]
    if kept and lost:
        raise UsageError(
            f"{', '.join(lost)} would look for its memory of the stage before, which has only {', '.join(left)}. Give "
            f"{', '.join(lost)} to {before.name!r}, too, or take {', '.join(kept)} out here."
        )
    return kept


def stage_yaml(plan: Plan, stage: Stage, model: str | None = None, memory: Path | None = None) -> dict[str, Any]:
    """All keys of one stage, for `ftplus sft --config`.

    Args:
        model: what the stage before left; None where that has not run yet.
        memory: the same.
    """
    ours, strategies = _strategies(stage)
    found = {key: value for key, value in stage.yaml.items() if key not in LOOKED_AT[:4]}
    found |= {"output_dir": str(stage.folder)}
    found |= {"model_name_or_path": model} if model else {}
    found |= {"memory": str(memory)} if memory else {}
    own = {stage.name: stage.measured_as}
    declared = {task.name for task in stage.tasks} & plan.gathered.keys()
    protect = {spec.name: str(spec).partition("=")[2] for spec in parse_all(ours.get("protect", ()))}
    pools = {other.name: str(plan.pool(other)) for other in plan.stages[: stage.number - 1] if plan.keep}
    distinct_names([*protect, *pools])
    metrics = dict(text.partition("=")[::2] for text in ours.get("metric", ()))  # also of what only this stage protects
    metrics = {name: metric for name, metric in metrics.items() if name != "learn"} | plan.metrics
    parts = {
        "plugins": [{name: _settings(s, stage)} for name, s in zip(ours["plugin"], strategies, strict=True)],
        "protect": protect | pools,
        "measure": {own.get(name, name): data for name, data in plan.measure.items() if name not in declared},
        "metric": {own.get(name, name): metric for name, metric in metrics.items()},
    }
    found |= {key: value for key, value in parts.items() if value}
    return yaml.safe_load(yaml.safe_dump(found, sort_keys=False))


def _settings(strategy: Strategy, stage: Stage) -> dict[str, Any]:
    given = {item.name: getattr(strategy, item.name) for item in settings(type(strategy))}
    return given | (RESTS[strategy.name] if strategy.name in stage.rests else {})


# ---- on disk ---------------------------------------------------------------------------------------------------------


def handed_on(plan: Plan, stage: Stage) -> tuple[str | None, Path | None]:
    """Model and memory that a stage is given; None for the first, which has its own, and for a memory nobody left.

    Raises:
        StorageError: the stage before left a memory, and it is gone.
    """
    from ..report import Report

    before = plan.before(stage)
    if before is None:
        return None, None
    memory = memory_to_come(plan, stage)
    if memory and not (memory / "manifest.json").is_file():
        if before.report.is_file() and Report.load(before.report).facts.get("memory"):
            raise StorageError(
                f"{memory} is gone, and {', '.join(stage.remembers)} looks for it. Put it back; or remove "
                f"{before.folder}, and what follows it, to have the stage trained again."
            )
        memory = None
    return str(left_by(before)), memory


def memory_to_come(plan: Plan, stage: Stage) -> Path | None:
    """Where the stage before leaves the memory that a stage is given, if it is given one."""
    before = plan.before(stage)
    return before.folder / "ftplus" / "memory" if before and stage.remembers else None


def left_by(stage: Stage) -> Path:
    """The model that a stage leaves for those after it."""
    return stage.folder / MERGED if stage.config.model.use_peft else stage.folder


def hand_on(plan: Plan, stage: Stage) -> None:
    """Leave what later stages start from, unless it is there: rows of the learn set, a model without adapter."""
    from ..report import Report
    from ..rows import learn_rows
    from .reservoir import pool, rows_taken, write

    if plan.is_last(stage):
        return
    file, merged = plan.pool(stage), stage.folder / MERGED
    if plan.keep and not file.is_file():
        seed = [stage.config.training.seed, zlib.crc32(stage.name.encode())]
        taken = rows_taken(stage.config, Report.load(stage.report).facts)
        learn = learn_rows(stage.config)[0]
        rows = pool(learn, stage.config, plan.keep, seed, stage.name, taken, measured(plan, stage))
        with storing(file):
            write(rows, file)
        note_measured(plan, stage)
    if (stage.folder / "adapter_config.json").is_file() and not merged.is_dir():
        for half in stage.folder.glob(".merged-*"):  # of a kill
            shutil.rmtree(half, ignore_errors=True)
        with storing(merged), tempfile.TemporaryDirectory(dir=stage.folder, prefix=".merged-") as scratch:
            _merge(stage, plan.stages[stage.number], Path(scratch) / "model")
            os.replace(Path(scratch) / "model", merged)


def measured(plan: Plan, stage: Stage) -> set[int]:
    """What the rows say that its task is measured on."""
    from ..row_checks import said, spread
    from ..rows import of_training

    found = {said(row) for gathered in told(plan, stage) for row in gathered.rows}
    if stage.name in plan.gathered:
        return found
    config = stage.config
    (spec,) = (spec for spec in config.measure if spec.name == stage.measured_as)
    spec = replace(spec, through=of_training(config)) if spec.name == "learn" else spec
    return found | {said(row) for row in spread(spec.load(config.training.seed), config.measure_rows)}


def note_measured(plan: Plan, stage: Stage) -> None:
    """Note for the matrix where rows that were kept of a stage are measured, too."""
    from ..row_checks import said

    if not plan.keep or not plan.pool(stage).is_file():
        return
    kept, known = load(str(plan.pool(stage))), measured(plan, stage)
    if same := sum(said(row) in known for row in kept):
        plan.notes.append(
            f"{same} of {len(kept)} rows kept of {stage.name} are measured, too, for fewer than keep: {plan.keep} are "
            f"not: its BWT looks better than it is. For other rows: measure: {{{stage.name}: DATA}}, or keep fewer."
        )


def _merge(stage: Stage, after: Stage, out: Path) -> None:
    """Merge in the precision that the base was trained in, or saved in if that is finer; or in fp32.

    Rounding to few bits takes away more of a small step than of a large one. Where it would take more than a tenth of
    what the adapter did, the model is kept in fp32, and then those of all later adapters, too: their base is fp32. A
    stage that trains with few bits rounds it in memory when it loads it, and starts from that; but its adapter is
    merged into what is on disk, so that small steps add up there.
    """
    from .. import merged
    from ..callback import give_back_memory

    own, device = str(stage.config.model.dtype or "auto"), "cpu" if stage.config.training.use_cpu else None
    try:
        merged.merge(str(stage.folder), out, "float32" if own == "float32" else "auto", device, tolerance=TOLERANCE)
        return
    except merged.RoundedAwayError as error:
        would = error.merged
    give_back_memory()
    few = after.config.model.dtype
    then = f" {after.name} (dtype: {few}) starts from it as rounded in memory; dtype: float32 there keeps all of it."
    click.echo(
        f"{stage.name}: its merged model is kept in float32, as rounding to {would.dtype} would move the logits by "
        f"{would.lost:.0%} of what the adapter did.{then if few in ('bfloat16', 'float16') else ''}",
        err=True,
    )
    merged.merge(str(stage.folder), out, "float32", device, tolerance=float("inf"))


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """A disk that fails is said in a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}. Choose another output_dir.") from error
