"""Runs under DeepSpeed on two gloo processes of CPUs; started by test_deepspeed.py as `zero.py STAGE FOLDER RANK`.

Stage 0 is DDP, without DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import trl
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor
from training import PROTECT, trainer
from transformers import TrainerCallback
from two import meet

from hf_ftplus import EWC, Run, Strategy, StrategyCallback
from hf_ftplus.run import costs
from hf_ftplus.strategies.distill import Distill
from hf_ftplus.strategies.replay import Replay
from hf_ftplus.strategies.si import SI

CUT, RATE, NUDGE = 2, 0.1, 2.0**-12
"""The step that a resumed run goes on from; the learning rate; what is lost beside a gradient of 1 in bf16."""


def ewc() -> EWC:
    return EWC(strength=100.0, fisher="empirical", rows=8)


@dataclass
class Nudge(Strategy):
    """Adds a little to every gradient, and looks whether plain SGD made of it what it should, to the last bit of fp32."""

    name: ClassVar[str] = "nudge"

    def prepare(self, run: Run) -> None:
        self.steps = 0
        assert {weight.dtype for weight in run.weights.values()} == {torch.float32}

    def before_step(self, run: Run) -> None:
        assert run.clip == 1.0
        self.asked = {}
        for name, weight in run.weights.items():
            assert weight.dtype == weight.grad.dtype == torch.float32
            weight.grad.add_(weight.grad.abs().max(), alpha=NUDGE)
            self.asked[name] = weight.detach() - RATE * weight.grad

    def after_step(self, run: Run) -> None:
        self.steps += 1
        for name, weight in run.weights.items():
            torch.testing.assert_close(weight.detach(), self.asked[name], rtol=1e-6, atol=1e-8)
            weight.data.add_(NUDGE)  # as strategies do that project weights
            self.asked[name] = weight.detach().clone()

    def finish(self, run: Run) -> None:
        assert all(torch.equal(weight, self.asked[name]) for name, weight in run.weights.items())


class Preview(TrainerCallback):
    """Asks what preparing will cost when DeepSpeed holds the model already, as `ftplus sft` does."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not state.global_step:
            list(costs(self.trainer, train_dataloader))


def made(stage: int, folder: Path, *strategies, first: Path | None = None, **kwargs):
    """A trainer of the tiny model, or of what a first run made of it and with its memory."""
    model = tiny_llama(tie=False)
    if first:
        model.load_state_dict(load_file(first / "weights.safetensors"))
        kwargs["memory"] = first / "ftplus/memory"
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(auto, "auto"),
    }  # fmt: skip
    usual = {"optim": "adamw_torch", "adam_epsilon": 1.0, "max_steps": 4, "logging_steps": 1, "learning_rate": RATE}
    return trainer(
        folder, *strategies, model=model, protect=PROTECT[:6],
        **usual | ({"deepspeed": config} if stage else {}) | kwargs,
    )  # fmt: skip


def found_in(it, stage: int) -> dict[str, Tensor]:
    """Weights, and state of strategies."""
    weights = it.model.state_dict()
    if stage == 3:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {name: safe_get_full_fp32_param(weight) for name, weight in it.model.named_parameters()}
    for strategy in it.ftplus.strategies:
        weights |= {f"{strategy.name}.{name}": tensor for name, tensor in strategy.state_dict().items()}
    return {name: weight.detach().float().cpu().clone() for name, weight in weights.items()}


def trained(stage: int, folder: Path, *strategies, **kwargs) -> dict[str, Tensor]:
    preview = Preview()
    preview.trainer = it = made(stage, folder, *strategies, callbacks=[preview], **kwargs)
    it.train()
    if stage:  # DeepSpeed's optimizer steps by itself again
        assert "step" not in vars(it.optimizer.optimizer)
    return found_in(it, stage)


def first_run(folder: Path) -> None:
    """Leaves memory of SI, and the weights that it is of."""
    it = made(0, folder, SI(), max_steps=3)
    it.train()
    if it.args.should_save:
        save_file(it.model.state_dict(), folder / "weights.safetensors")
    torch.distributed.barrier()


def on_gradients(stage: int, folder: Path, name: str, *strategies, again) -> dict[str, Tensor]:
    """A run of strategies that act on gradients, and the same one resumed from its middle."""
    kwargs = {
        "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": CUT, "lr_scheduler_type": "constant",
        "first": folder / "first" if name == "si" else None,
    }  # fmt: skip
    done = trained(stage, folder / name, *strategies, **kwargs)
    it = made(stage, folder / name, *again, **kwargs)
    it.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{CUT}"))
    return done | {f"resumed {key}": tensor for key, tensor in found_in(it, stage).items()}


def same_in_a_callback(stage: int, folder: Path) -> None:
    """Under DeepSpeed a callback knows the gradients as they were before clipping, too, which SI asks for."""
    ours = trained(stage, folder / "mixin", ewc(), SI(), max_grad_norm=0.01)
    callback = StrategyCallback(ewc(), SI(), protect=PROTECT[:6])
    theirs = made(stage, folder / "callback", cls=trl.SFTTrainer, callbacks=[callback], max_grad_norm=0.01)
    theirs.train()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.model.state_dict().items())
    assert callback.around is None


def all_runs(stage: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    found = {"replay": trained(stage, folder / "replay", Replay(share=0.25))}
    if stage == 3:
        return found
    found["distill"] = trained(stage, folder / "distill", Distill(on="both", share=0.5, strength=10.0))
    if not stage:
        first_run(folder / "first")
    for name, make in {
        "ewc": lambda: [ewc()],
        "si": lambda: [SI(strength=0.1)],
        "both": lambda: [Replay(share=0.25), ewc()],
    }.items():
        found[name] = on_gradients(stage, folder, name, *make(), again=make())
    if stage:
        for bf16 in (False, True):
            nudge = Nudge()
            trained(
                stage, folder / "nudge", nudge, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, bf16=bf16
            )
            assert nudge.steps == 4
        same_in_a_callback(stage, folder)
    return found


if __name__ == "__main__":
    stage, folder, rank = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.environ["DS_ACCELERATOR"] = "cpu"
    if stage:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, which takes minutes
    meet(folder, rank)
    runs = all_runs(stage, folder)
    save_file(
        {f"{run}/{name}": t for run, found in runs.items() for name, t in found.items()},
        folder / f"rank{rank}.safetensors",
    )
    torch.distributed.barrier()
