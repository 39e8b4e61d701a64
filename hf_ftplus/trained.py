"""A model that was trained, ready to be asked: a whole one, or an adapter on its base; and what its run began with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from .callback import STATE_FOLDER
from .disk import read_json
from .errors import DataError, reason
from .model import resolve, unloadable

ADAPTER = "adapter_config.json"
OF_ADAPTER = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt")
"""Files of an adapter and its tokenizer, as they lie at the top of a repository on the Hub."""


@dataclass
class Trained:
    """A model with its tokenizer."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    off: bool = False
    """Whether it is asked without its adapter."""

    def base(self) -> Trained:
        """The same model without its adapter; no second one is loaded."""
        return replace(self, name="base", off=True)

    def speaking(self) -> AbstractContextManager[Any]:
        """Inside, `model` is this model."""
        return self.model.disable_adapter() if self.off else nullcontext()


def load(name: str, dtype: str = "auto", device: str | None = None) -> Trained:
    """A model by folder, Hub name or `demo`; an adapter is put on the base that its configuration names.

    Args:
        name: of the model, or of an adapter.
        dtype: of its weights; "auto" as they were saved.
        device: where it goes; the accelerator if there is one, if left out.

    Raises:
        DataError: there is no such model, or no tokenizer beside it.
    """
    path, base = placed(name), base_of(name)
    with _below(name, base):
        model = weights(base or path, dtype)
    if base:
        from peft import PeftModel

        with _said_of(name):
            _fit_embeddings(model, Path(path))
            model = PeftModel.from_pretrained(model, path)
    device = device or device_here()
    try:
        return Trained(name, model.eval().to(device), _tokenizer(path, base))
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{name} does not fit into the memory of {device}: {reason(error)} Type --device cpu."
        ) from error
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such device, or torch was built without
        raise DataError(f"--device {device}: {reason(error).rstrip('.')}. Leave it out, or type cpu.") from error


def device_here() -> str:
    """The kind of the accelerator if there is one that works: a torch built for CUDA names it without a GPU, too."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that need not be loaded yet.

    Raises:
        DataError: as `load`, as far as can be told without weights.
    """
    path, base = placed(name), base_of(name)
    with _below(name, base), _said_of(base or name):
        there, revision = at(base or path)
        AutoConfig.from_pretrained(there, revision=revision)
    return _tokenizer(path, base)


def weights(name: str, dtype: str = "auto") -> PreTrainedModel:
    """The causal LM of this name, unquantised."""
    there, revision = at(name)
    with _said_of(name):
        return AutoModelForCausalLM.from_pretrained(there, revision=revision, dtype=dtype)


def at(name: str) -> tuple[str, str]:
    """A folder, or a name on the Hub, and the revision of it: of NAME@REVISION, else main.

    Raises:
        DataError: FOLDER@REVISION, of which transformers would load the folder as it is.
    """
    there, _, revision = name.partition("@")
    if not revision or os.path.exists(name):
        return name, "main"
    if os.path.isdir(there):
        raise DataError(f"{there} is a folder, which has no revisions. Leave @{revision} out.")
    return there, revision


def pinned(name: str, revision: str | None) -> str:
    """What `at` takes apart."""
    return name if revision in (None, "main") or os.path.exists(name) else f"{name}@{revision}"


def placed(name: str) -> str:
    """As `resolve`; an adapter on the Hub is downloaded, and is the folder that holds it then.

    Raises:
        DataError: there is no such model.
    """
    path = resolve(name)
    if Path(path).is_dir():
        return path
    there, revision = at(path)
    with _said_of(name):
        if find_adapter_config_file(there, revision=revision) is None:
            return path
        return snapshot_download(there, revision=revision, allow_patterns=OF_ADAPTER, ignore_patterns="*/*")


def base_of(name: str) -> str | None:
    """The model below the adapter `name`; None where there is no adapter."""
    file = Path(placed(name)) / ADAPTER
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {reason(error)}. Expected the configuration of an adapter.") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base:
        raise DataError(f"{file} names no base_model_name_or_path; expected the model that the adapter was trained on.")
    if Path(resolve(base)).is_dir() and Path(resolve(base)).samefile(file.parent):
        raise DataError(f"{file} names its own folder as its base; expected the model that the adapter was trained on.")
    return pinned(resolve(base), config.get("revision"))


def began_with(name: str) -> str:
    """The model that the run in the folder `name`, or that of which it is a checkpoint, started from: its report says.

    Raises:
        DataError: there is no report, or a damaged one.
    """
    folder = Path(resolve(name))
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    file = run / STATE_FOLDER / "report.json"
    try:
        model = read_json(file)["facts"]["config"]["model"]
        return pinned(model["model_name_or_path"], model.get("model_revision"))
    except FileNotFoundError:
        found = f"There is no {file}"
    except (OSError, ValueError, KeyError, TypeError):
        found = f"{file} is no whole report"
    raise DataError(f"{found}, so what {name} started from is not known. Name it: --compare-with MODEL.")


def _fit_embeddings(model: PreTrainedModel, adapter: Path) -> None:
    """Give the base as many embeddings as an adapter brings that was trained with tokens added."""
    file = adapter / "adapter_model.safetensors"
    if file.with_suffix(".bin").is_file():  # as PEFT once wrote them
        return
    if not file.is_file():
        raise DataError(f"{adapter} holds {ADAPTER} but no {file.name}; expected the weights of the adapter, too.")
    place = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        rows = {tensors.get_slice(name).get_shape()[0] for name in names if name.endswith(f"{place}.weight")}
    if rows and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _tokenizer(path: str, base: str | None) -> PreTrainedTokenizerBase:
    for place in filter(None, (path, base)):
        there, revision = at(place)
        try:
            return AutoTokenizer.from_pretrained(there, revision=revision)
        except (OSError, ValueError) as error:
            last = error
    raise DataError(f"{path} has no tokenizer that can be loaded: {reason(last)}") from last


@contextmanager
def _below(name: str, base: str | None) -> Iterator[None]:
    """Say whose base it is that cannot be had."""
    try:
        yield
    except DataError as error:
        if base is None:
            raise
        raise DataError(f"{name} is an adapter of {base!r}. {error}") from error


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # missing, malformed, other shapes, damaged
        if isinstance(error, OSError) and "/" not in name and not os.path.exists(name):
            raise DataError(
                f"There is no folder {name}, nor could a model of this name be had from the Hub. Expected the folder "
                "that `ftplus sft` wrote, a name on the Hub, or demo."
            ) from error
        raise unloadable(name, error) from error
