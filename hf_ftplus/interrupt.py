"""Ctrl-C and SIGTERM: the step is finished and saved, by all ranks or none."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("hf_ftplus")

ONE_PRESS = 1.0
"""Seconds within which signals are one and the same Ctrl-C: launchers pass on what the terminal sent as well."""


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM while training: finish the step, save a checkpoint to resume from, stop with 130 or 143.

    A second one stops at once; the last whole checkpoint stays. In a launched run a rank may be told a step before
    another, and a save needs all of them: so at the end of each step the ranks agree on whether any was told, which
    costs such a run one number over the network per step and a wait for the device (where the Trainer waits anyway,
    unless logging_nan_inf_filter is off).
    """

    def __init__(self) -> None:
        self.agreed = 0
        """The signal that all ranks save and stop for."""
        self.saved = False
        self._told, self._since, self._over = 0, 0.0, False
        self._before: dict[int, Any] = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._tell) for number in (signal.SIGINT, signal.SIGTERM)}

    def _tell(self, number: int, frame: Any) -> None:
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)  # who listened before us hears it, too
        if self._over:  # no step is left to save after
            raise KeyboardInterrupt(128 + number)
        if self._told and time.monotonic() - self._since > ONE_PRESS:
            raise KeyboardInterrupt(128 + number)
        if not self._told:
            self._told, self._since = number, time.monotonic()
            logger.warning("%s: saving after this step; another one stops at once.", signal.Signals(number).name)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agreed = self._told
        if args.world_size > 1:
            told = torch.tensor(self._told, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.agreed = int(told)
        control.should_save = control.should_save or bool(self.agreed)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed:
            self.saved = True
            args.distributed_state.wait_for_everyone()  # the first rank to leave is the end of the others
            raise KeyboardInterrupt(128 + self.agreed)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._over = control.should_training_stop or state.global_step >= state.max_steps
        if self._over and not self.agreed:  # told since the last step ended
            self.on_step_end(args, state, control)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
