"""Strategies under DeepSpeed ZeRO-1 and ZeRO-2: whole gradients around the step that DeepSpeed makes by itself.

There backward() steps as well, so the Trainer's moments before and after the optimizer come too late. But DeepSpeed's
optimizer has a `step` of its own, called when all micro-batches of all ranks are reduced, and each rank holds a part of
every gradient, and of the fp32 weights that the optimizer moves:

    gather both into the weights                                  strategies read and add to gradients
    leave to each rank its part; DeepSpeed clips and steps
    put both into the weights once more                           strategies see what the step did

So strategies are given what DDP gives them: all trained weights in fp32, gradients as training computed them, whole on
every rank, and whole they keep their state. ZeRO splits the optimizer as before. Written against DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import TrainingArguments

from .errors import IncompatibleError

DEEPSPEED = "0.19.8"
"""The lowest that was tried: others keep gradients elsewhere. https://github.com/deepspeedai/DeepSpeed/releases"""


def under_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed really trains; on CPUs accelerate may leave it out without a word."""
    return args.distributed_state.distributed_type == "DEEPSPEED"


class Around:
    """Calls `before` and `after`, if any, around each step of DeepSpeed's `optimizer`, with all gradients in `weights`.

    Raises:
        IncompatibleError: an optimizer of DeepSpeed that keeps gradients in another way.
    """

    def __init__(
        self,
        optimizer: Any,
        weights: Iterable[nn.Parameter],
        before: Callable[[], None],
        after: Callable[[], None] | None,
    ) -> None:
        refuse(optimizer)
        self.optimizer, self.weights = optimizer, list(weights)
        self.before, self.after, self._inner = before, after, optimizer.step
        self._wide = {weight: None for weight in self.weights if weight.dtype != torch.float32}
        optimizer.step = self._step

    def remove(self) -> None:
        """Leave the optimizer as it was found."""
        vars(self.optimizer).pop("step", None)
        self._wide.clear()

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        gradients = self._gathered()
        with self.whole(gradients):
            self.before()
        self._scatter(gradients)
        if self.after is None:
            gradients.clear()
        found = self._inner(*args, **kwargs)
        if self.after is not None and not self.optimizer.overflow:
            with self.whole(gradients):
                self.after()
        return found

    @contextmanager
    def whole(self, gradients: dict[nn.Parameter, Tensor] | None = None) -> Iterator[None]:
        """For the block: the fp32 weights in place of those in 16 bits, and `gradients`, which are taken back as they
        are left. What is done to weights, the optimizer's own learn. DeepSpeed sees no backward pass of the block."""
        with unseen(self.optimizer), self._in_place(gradients):
            yield

    @contextmanager
    def _in_place(self, gradients: dict[nn.Parameter, Tensor] | None) -> Iterator[None]:
        from deepspeed.utils import safe_set_full_fp32_param

        narrow = {weight: weight.data for weight in self._wide}
        try:
            for weight in narrow:
                weight.data = self._widened(weight)
            for weight, gradient in (gradients or {}).items():
                weight.grad = gradient
            yield
            for weight in self.weights:
                safe_set_full_fp32_param(weight, weight.data)
            for weight in gradients or ():
                gradients[weight] = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            for weight, data in narrow.items():
                data.copy_(weight.data)
        finally:
            for weight in self.weights:
                weight.grad = None
            for weight, data in narrow.items():
                weight.data = data

    def _widened(self, weight: nn.Parameter) -> Tensor:
        """The optimizer's own copy of a weight, always at one place: strategies keep views of it."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(weight)
        self._wide[weight] = found if self._wide[weight] is None else self._wide[weight].copy_(found)
        return self._wide[weight]

    def _gathered(self) -> dict[nn.Parameter, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {weight: safe_get_full_grad(weight) for weight in self.weights}

    def _scatter(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """To each rank its part, in fp32: in 16 bits the pull of a penalty would be lost beside a larger gradient."""
        from deepspeed.utils import safe_set_full_grad

        parts = self.optimizer.averaged_gradients
        for group, held in parts.items():
            if any(part.dtype != torch.float32 for part in held):
                parts[group] = [part.float() for part in held]
        for weight, gradient in gradients.items():
            safe_set_full_grad(weight, gradient)


@contextmanager
def unseen(optimizer: Any) -> Iterator[None]:
    """DeepSpeed's `optimizer` of ZeRO-1 or -2 sees no backward pass of the block, which it would take for training."""
    handles = getattr(optimizer, "_grad_acc_hooks", [])
    if not handles or not hasattr(optimizer, "create_gradient_handling_hooks"):
        yield
        return
    while handles:
        handles.pop().remove()
    try:
        yield
    finally:
        optimizer.create_gradient_handling_hooks()


def refuse(optimizer: Any) -> None:
    """Raise for what was not tried: other versions, other optimizers of DeepSpeed, those that lie on the CPU, and fp16,
    whose gradients are scaled."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    found = metadata.version("deepspeed")
    if Version(found) < Version(DEEPSPEED):
        raise IncompatibleError(
            f"DeepSpeed {found} is installed; strategies that act on gradients need {DEEPSPEED} or newer. Type: pip "
            f"install 'deepspeed>={DEEPSPEED}', or launch with --accelerate_config fsdp2."
        )
    if type(optimizer) is not DeepSpeedZeroOptimizer:
        raise IncompatibleError(
            f"DeepSpeed trains with its {type(optimizer).__name__}, whose gradients strategies cannot reach; expected "
            "that of ZeRO-1 or ZeRO-2. Leave data_types and zenflow out of its configuration, or launch with "
            "--accelerate_config zero2 or fsdp2."
        )
    if optimizer.cpu_offload:
        raise IncompatibleError(
            "DeepSpeed keeps the optimizer in CPU memory, where strategies cannot reach its gradients. Leave "
            "offload_optimizer out (offload_optimizer_device: none), or launch with --accelerate_config fsdp2."
        )
    if optimizer.dtype == torch.float16:
        raise IncompatibleError(
            "DeepSpeed trains in fp16, where it scales gradients and skips steps, which no strategy has tried. Type "
            "--bf16 true, or launch with --accelerate_config fsdp2."
        )
