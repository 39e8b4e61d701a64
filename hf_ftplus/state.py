"""What a strategy knows, on disk: safetensors and a manifest, verified before anything is believed.

    checkpoint-N/ftplus/<strategy>.safetensors   +  manifest.json      written before the Trainer rotates or pushes
    OUTPUT/ftplus/memory/<strategy>.safetensors  +  manifest.json      what the next run takes with --memory

The manifest is written last and holds a sha256 of every file (safetensors has no checksum of its own) and the identity
of the model. Nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import tensorfile
from .disk import read_format, sha256, write
from .errors import FTPlusError, IncompatibleError, StorageError
from .sketch import compare, sketch
from .weights import canonical, full_shape, local, match, ranks

if TYPE_CHECKING:
    from .strategy import Run, Strategy

FORMAT = 1
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
"""Format -> what makes a manifest of the next one of it. There is one so far."""
MANIFEST = "manifest.json"
ADAPTER = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "base_model_name_or_path",
)
"""Settings of an adapter with which another one trains on weights of the same shapes."""
SKETCH = "sketch of the model: "
"""Precedes the names of the tensors that tell which model a memory was left with."""


def save_checkpoint(
    folder: Path, states: dict[str, dict[str, Tensor]], model: nn.Module, step: int, **facts: Any
) -> None:
    """Write the state of every strategy, and `facts` about the run, into `folder` (`checkpoint-N/ftplus`)."""
    _write(folder, states, {**facts, "step": step, "model": identity(model)})


def settings_of(strategies: list[Strategy]) -> dict[str, str]:
    """`{"ewc": "EWC(strength=3000.0, ...)"}`."""
    return {strategy.name: repr(strategy) for strategy in strategies}


def checkpoint_fact(folder: Path, name: str) -> Any:
    """A fact that `save_checkpoint` was given; None where there is none."""
    return (_manifest(folder) or {}).get(name)


def load_checkpoint(
    folder: Path, settings: dict[str, str], model: nn.Module, step: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """State of each strategy; arguments as for `check_checkpoint`.

    Raises:
        IncompatibleError: see there.
        StorageError: a file does not have the contents it was written with.
    """
    manifest = check_checkpoint(folder, settings, model, step)
    return {name: _read(folder, name, manifest) for name in settings}


def check_checkpoint(
    folder: Path, settings: dict[str, str], model: nn.Module, step: int | None = None
) -> dict[str, Any]:
    """What a checkpoint says of itself, if it is of this run; no tensor is read.

    Args:
        folder: `checkpoint-N/ftplus`.
        settings: of every strategy of the run by its name, as its `repr` says them.
        model: of the run.
        step: that the trainer resumes at, once it is known.

    Raises:
        IncompatibleError: no state there, other strategies or settings, another model, adapter or step; names what
            differs.
    """
    names, manifest = sorted(settings), _manifest(folder)
    if manifest is None:
        raise IncompatibleError(
            f"{folder} holds no strategy state, so {', '.join(names)} would start from the weights of the checkpoint "
            "and protect those. Resume from a checkpoint that hf_ftplus wrote, or start a new run."
        )
    saved = sorted(manifest["files"])
    if saved != names:
        raise IncompatibleError(
            f"{folder} was written with the strategies {saved or 'none'}; this run has {names or 'none'}. "
            "Resume with the same --plugin names, or start a new run."
            + "".join(_to_install(name, manifest) for name in saved if name not in names)
        )
    _same_settings(manifest.get("settings", {}), settings, folder)
    same_identity(manifest["model"], identity(model), folder)
    if step is not None and manifest["step"] != step:
        raise IncompatibleError(f"{folder} is of step {manifest['step']}; the trainer resumes at step {step}.")
    return manifest


def missing_plugin(output: Path, name: str) -> str:
    """Where a run was begun with this strategy, which is not installed, and what to type; or nothing."""
    for folder in sorted(output.glob("checkpoint-*/ftplus"), key=lambda folder: folder.stat().st_mtime, reverse=True):
        with suppress(FTPlusError, OSError):
            manifest = _manifest(folder) or {"files": {}}
            if name in manifest["files"]:
                return f"{folder.parent} was written with it.{_to_install(name, manifest)}"
    return ""


def _to_install(name: str, manifest: dict[str, Any]) -> str:
    """Who published a strategy; nothing for one of ours or of a file, and where an earlier version did not say.

    No command to copy: a checkpoint of somebody else could name anything.
    """
    if name not in manifest.get("plugins", {}):
        return ""
    distribution, version = manifest["plugins"][name]
    return f" {name} came from {distribution} {version}: install it from where you had it."


def _same_settings(saved: dict[str, str], now: dict[str, str], folder: Path) -> None:
    """Raise where a setting that both know has another value."""
    differ = []
    for name in sorted(saved.keys() & now):
        there, here = settings_in(saved[name]), settings_in(now[name])
        keys = [key for key in here if key in there and there[key] != here[key]]
        differ += [f"{name}.{key} {there[key]} there, {here[key]} here" for key in keys]
    if differ:
        raise IncompatibleError(
            f"{folder} was written with other settings: {'; '.join(differ)}. Put them back to go on (--set "
            "NAME.SETTING=VALUE), or start a new run."
        )


def settings_in(text: str) -> dict[str, str]:
    """`EWC(strength=3000.0)` -> {"strength": "3000.0"}; nothing of a text that is no such call."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return {item.arg: ast.unparse(item.value) for item in keywords if item.arg}


def save_memory(folder: Path, name: str, tensors: dict[str, Tensor], run: Run) -> None:
    """Leave `tensors` of one strategy for the next run; other strategies' memories in the folder stay."""
    drawn = {f"{SKETCH}{key}": part for key, part in sketch(run.model).items()}
    kept = _manifest(folder) or {"files": {}}
    facts = {"step": run.step, "model": identity(run.model), "shapes": shapes(run.model)}
    _write(folder, {name: {**tensors, **drawn}}, facts, kept["files"])


def load_memory(folder: Path, name: str, run: Run) -> dict[str, Tensor]:
    """What `save_memory` left for `name`, for a run that starts from the model it was left with.

    Raises:
        StorageError: no memory in `folder`, or a damaged file.
        IncompatibleError: the starting model is not the one that run ended with.
    """
    manifest = _manifest(folder)
    if manifest is None or name not in manifest["files"]:
        held = sorted(manifest["files"]) if manifest else "nothing"
        raise StorageError(
            f"{folder} holds no memory of {name!r} (found: {held}). Give the OUTPUT/ftplus/memory folder of a finished "
            f"run that used --plugin {name}."
        )
    tensors = _read(folder, name, manifest)
    drawn = {key: tensors.pop(key) for key in list(tensors) if key.startswith(SKETCH)}
    found = compare({key.removeprefix(SKETCH): part for key, part in drawn.items()}, sketch(run.model))
    if found.differing:
        raise IncompatibleError(
            f"The memory in {folder} was left with another model: {reshaped(manifest, run.model)}"
            f"{found.differing:,} of {found.sampled:,} sampled weights differ, compared in "
            f"{str(found.precision).removeprefix('torch.')}; expected none. Start from the model that run saved "
            "(--model_name_or_path ITS_OUTPUT), or leave --memory out."
        )
    return tensors


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of every weight but those of LoRA adapters, which another adapter of the same model may have otherwise."""
    named = {canonical(name): list(full_shape(weight)) for name, weight in model.named_parameters()}
    return {name: shape for name, shape in named.items() if "lora_" not in name}


def reshaped(manifest: dict[str, Any], model: nn.Module) -> str:
    """How many weights have another shape than when a memory was left, and the first of them; empty where none has."""
    was, now = manifest.get("shapes"), shapes(model)
    was = was if isinstance(was, dict) else manifest["model"]["weights"]
    differ = [name for name, shape in now.items() if was.get(name, shape) != shape]
    if not differ:
        return ""
    first = differ[0]
    return f"{len(differ)} weights have other shapes ({first} {was[first]} there, {now[first]} here), and "


def identity(model: nn.Module) -> dict[str, Any]:
    """Trainable weights by canonical name with their shapes, and the adapter's settings that shapes do not show.

    Two adapters that train at once share names; only strategies must tell them apart, and refuse them (`trainable`).
    """
    adapters = getattr(model, "peft_config", {})
    trained = {canonical(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {
        "weights": {name: list(full_shape(weight)) for name, weight in trained.items()},
        "adapters": {name: _adapter_facts(config) for name, config in adapters.items()},
    }


def _adapter_facts(config: Any) -> dict[str, Any]:
    facts = {key: getattr(config, key, None) for key in ADAPTER}
    targets = getattr(config, "target_modules", None)
    return {**facts, "target_modules": sorted(targets) if isinstance(targets, (set, list)) else targets}


def same_identity(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise where weights, shapes or adapters differ from those that were saved.

    Raises:
        IncompatibleError: lists what does.
    """
    match(now["weights"], saved["weights"], f"The state in {where}")
    other_shapes = [
        f"{name} {saved['weights'][name]} there, {shape} here"
        for name, shape in now["weights"].items()
        if saved["weights"][name] != shape
    ]
    if other_shapes:
        raise IncompatibleError(f"The state in {where} has other shapes: {'; '.join(other_shapes[:10])}.")
    for name, facts in now["adapters"].items():
        was = saved["adapters"].get(name) or dict.fromkeys(facts)  # an earlier version knew fewer settings
        both = {key: value for key, value in facts.items() if key in was and was[key] != value}
        differ = [f"{key} {was[key]!r} there, {value!r} here" for key, value in both.items()]
        if differ:
            raise IncompatibleError(f"The state in {where} is of another adapter: {'; '.join(differ)}.")


def _write(
    folder: Path, files: dict[str, dict[str, Tensor]], facts: dict[str, Any], kept: dict[str, Any] | None = None
) -> None:
    """All tensors, if they are finite, then the manifest; all ranks call, rank 0 writes, and all fail if one does."""
    if broken := agreed(_not_finite(files)):
        raise IncompatibleError(
            f"{broken} is not finite at step {facts['step']}, so nothing is written to {folder}; what was written "
            "before is intact. Lower the strength or the learning rate, or train in bf16 or fp32 instead of fp16."
        )
    if failed := agreed(_written(folder, files, facts, kept)):
        raise StorageError(
            f"Could not write strategy state to {folder}: {failed}. Free some space or choose another --output_dir."
        )


def agreed(said: str) -> str:
    """What this rank says went wrong, or the first that any of them says."""
    if ranks()[1] == 1:
        return said
    every: list[str] = [""] * ranks()[1]
    torch.distributed.all_gather_object(every, said)
    return next(filter(None, every), "")


def _not_finite(files: dict[str, dict[str, Tensor]]) -> str:
    """Which tensor of which strategy is broken, if this rank's part of any is."""
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not local(tensor).isfinite().all():
                return f"State of {name}: {key}"
    return ""


def _written(
    folder: Path, files: dict[str, dict[str, Tensor]], facts: dict[str, Any], kept: dict[str, Any] | None
) -> str:
    """What went wrong, if anything."""
    writes = ranks()[0] == 0
    entries, failed = dict(kept or {}), ""
    for name, tensors in files.items():
        try:
            entries[name] = tensorfile.write(folder / f"{name}.safetensors", tensors, writes and not failed)
        except OSError as error:  # the others' tensors are gathered all the same
            failed = str(error)
    if writes and not failed:
        text = json.dumps({"format": FORMAT, **facts, "files": entries}, indent=1)
        try:
            write(folder / MANIFEST, text)
        except OSError as error:
            failed = str(error)
    return failed


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with suppress(OSError, ValueError):
        manifest = read_format(path, FORMAT, MIGRATIONS)
        if _sound(manifest):
            return manifest
    raise StorageError(f"{path} is damaged. Use an earlier checkpoint, or another run's memory.")


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether it holds what `_write` puts there, of the right types: a damaged one may still be JSON."""
    files, model, settings = manifest.get("files"), manifest.get("model"), manifest.get("settings", {})
    plugins = manifest.get("plugins", {})
    return (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in files.values())
        and isinstance(model, dict)
        and isinstance(model.get("weights"), dict)
        and isinstance(model.get("adapters"), dict)
        and all(isinstance(facts, dict) for facts in model["adapters"].values())
        and isinstance(settings, dict)
        and isinstance(plugins, dict)
        and all(isinstance(item, list) and list(map(type, item)) == [str, str] for item in plugins.values())
        and all(isinstance(text, str) for text in settings.values())
    )


def _read(folder: Path, name: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    if not path.is_file() or sha256(path) != manifest["files"][name]["sha256"]:
        raise StorageError(
            f"{path} is missing or not what was written there (sha256 differs). Use an earlier checkpoint, or another "
            "run's memory."
        )
    try:
        return load_file(path)
    except SafetensorError as error:  # somebody wrote both anew
        raise StorageError(f"{path} is no safetensors file: {error}. Use an earlier checkpoint.") from None
