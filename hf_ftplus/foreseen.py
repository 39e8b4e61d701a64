"""What strategies refuse of a model that only its config describes: before it is loaded, or an earlier stage trains.

`refuse(None)` knows no model, and the loaded one may come hours later. In between, strategies are shown a Run whose
model has shapes and no numbers (torch's meta device), with the adapter that will sit on it and the tokenizer beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from .as_if import on_meta, sight
from .config import RunConfig
from .errors import FTPlusError
from .generate import private_rng
from .strategy import Run, Strategy


def refuse_foreseen(config: RunConfig, strategies: Iterable[Strategy]) -> None:
    """Let strategies refuse the model to come; a resumed run was asked when it began.

    Raises:
        FTPlusError: what a strategy refuses.
    """
    strategies = [] if config.training.resume_from_checkpoint else list(strategies)
    run = foreseen(config) if strategies else None
    for strategy in strategies if run else ():
        try:
            strategy.refuse(run)
        except FTPlusError:
            raise
        except Exception:  # it looks at numbers: it will be shown those of the loaded model
            continue


def foreseen(config: RunConfig) -> Run | None:
    """The Run to come, as far as files of the model without its weights tell; None where they do not."""
    from .preview import load_tokenizer

    try:
        with private_rng(torch.device("cpu"), config.training.seed):
            model = on_meta(config.model.model_name_or_path, config)
        run = sight(model, config, {spec.name: [] for spec in config.protect})
        return replace(run, tokenizer=load_tokenizer(config))
    except Exception:  # of files, of a model's own code, of PEFT: loading the model will say it
        return None
