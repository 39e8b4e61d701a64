"""What each of two gloo processes does; started by test_two_ranks.py as `ranks.py WHAT FOLDER RANK`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from batches import padded, random_rows
from lawful import Deaf, SmallLogits, Sorry
from safetensors.torch import save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from two import meet, part

from hf_ftplus import EWC, divergence, logits, origin, state
from hf_ftplus.errors import PluginError
from hf_ftplus.fisher import fisher
from hf_ftplus.generate import self_generate
from hf_ftplus.logits import captured, lm_head, supervised
from hf_ftplus.sketch import sketch
from hf_ftplus.strategy import Memory, Run
from hf_ftplus.teacher import AdapterOff
from hf_ftplus.weights import split, trainable

MODELS = {"tied": tiny_llama, "untied": lambda: tiny_llama(tie=False)}
ROWS = 5
"""An odd number, so that one rank has a row less than the other."""


def protect(size: int = 1) -> list[dict[str, Tensor]]:
    return padded(random_rows(ROWS, 384), size)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone().contiguous()


def importances(model: torch.nn.Module, **kwargs) -> dict[str, Tensor]:
    """Fisher of the three estimators; what is random depends on the batch alone."""
    plain, adapters = split(model)
    found = {}
    for estimator in ("empirical", "sign"):
        result = fisher(model, protect(), plain, adapters, estimator=estimator, **kwargs)
        found |= {f"{estimator}.{name}": whole(tensor) for name, tensor in result.named()}
    return found


def lora() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def trained(folder: Path, model: torch.nn.Module, size: int, **kwargs) -> dict[str, Tensor]:
    """Weights and EWC's state after 3 steps of 8 rows in all."""
    from training import trainer

    it = trainer(
        folder, EWC(strength=100.0), model=model, protect=protect(), max_steps=3, per_device_train_batch_size=size,
        optim="sgd", learning_rate=0.05, max_grad_norm=0.5, **kwargs,
    )  # fmt: skip
    it.train()
    found = {f"weights.{name}": whole(weight) for name, weight in trainable(it.model).items()}
    return found | {f"state.{name}": whole(tensor) for name, tensor in it.ftplus.strategies[0].state_dict().items()}


def everywhere(folder: Path, size: int) -> dict[str, dict[str, Tensor]]:
    """The runs that must end alike on one process (`size` 8) and two (`size` 4)."""
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    return {
        "fisher": importances(tiny_llama()),
        "fisher of LoRA": importances(lora()),
        "full": trained(folder / "full", tiny_llama(), size),
        "reentrant checkpointing": trained(folder / "reentrant", tiny_llama(), size, **reentrant),
        "LoRA": trained(folder / "lora", lora(), size),
    }


def ddp(folder: Path, rank: int) -> dict[str, Tensor]:
    found = everywhere(folder, 4)
    found = {f"{part}/{name}": tensor for part, tensors in found.items() for name, tensor in tensors.items()}
    return found | {"settled": settled(folder, rank)} | stopping(folder / "stopping", rank)


def held(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """EWC by hand: prepare, a step away, the pull, the figures, the state through a checkpoint and back."""
    strategy = EWC(strength=50.0, fisher="empirical")
    run = Run(
        model=model,
        weights=trainable(model),
        protect={"it": protect()},
        learn=lambda rows: [],
        device=torch.device("cpu"),
        seed=0,
        memory=Memory(),
    )
    strategy.prepare(run)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.mul_(1.01)
            weight.grad = torch.zeros_like(weight)
        strategy.before_step(run)
    found = {f"pull.{name}": whole(weight.grad) for name, weight in run.weights.items()}
    found |= {
        f"figure.{name}": torch.tensor(value) for name, value in strategy.metrics().items() if name != "grad_ratio"
    }
    state.save_checkpoint(folder / "saved", {"ewc": strategy.state_dict()}, model, step=3)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    back = EWC(strength=50.0, fisher="empirical")
    back.load_state_dict(state.load_checkpoint(folder / "saved", {"ewc": repr(strategy)}, model)["ewc"], run)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.grad = torch.zeros_like(weight)
        back.before_step(run)
    found |= {f"pull after resume.{name}": whole(weight.grad) for name, weight in run.weights.items()}
    return found | {f"saved.{name}": whole(tensor) for name, tensor in back.state_dict().items()}


def shards(model: torch.nn.Module, copies: bool = False, **kwargs) -> torch.nn.Module:
    """Sharded over both ranks; as `copies`, sharded over one, of which the other is a replica (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicas", "shards") if copies else ("shards",)
    mesh = init_device_mesh("cpu", (2, 1) if copies else (2,), mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, **kwargs)


def of_head(kind: str) -> dict[str, Tensor]:
    """What needs the LM head between forward and backward: the Fisher, and a loss on outputs."""
    model = MODELS[kind]()
    if torch.distributed.is_initialized():
        shards(model, reshard_after_forward=True)  # the root too, as older releases of accelerate do
    found = importances(model)
    for weight in model.parameters():
        weight.grad = None
    rank, world = (torch.distributed.get_rank(), 2) if torch.distributed.is_initialized() else (0, 1)
    for first, second in zip(protect()[::2], protect()[1::2], strict=False):
        for batch in (first, second)[rank::world]:
            seen: list[Tensor] = []
            with captured(model, seen.append):
                loss = model(**batch).loss
            hidden, head = supervised(seen[0], batch["labels"])[0], lm_head(model).whole()
            loss = loss + sum(head(hidden[part]).square().sum() for part in head.chunks(len(hidden)))
            loss.backward()
    # FSDP averages over ranks
    return found | {f"loss.{name}": whole(weight.grad) * world for name, weight in trainable(model).items()}


def of_teacher(model: torch.nn.Module) -> dict[str, Tensor]:
    """What the kernels of a GPU say of a student that moved away from the adapter's start, and its gradient."""
    if torch.distributed.is_initialized():
        shards(model.get_base_model(), reshard_after_forward=True)
    batch = protect(ROWS)[0]
    states, head = AdapterOff(model)(batch)
    hidden = (states * 1.1).requires_grad_()
    total, kl = divergence._with_trl(hidden, lm_head(model).whole(), states, head, 2.0, None)
    total.backward()
    return {"teacher.kl": kl, "teacher.gradient": hidden.grad}


def written(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    rows = self_generate(model, tiny_tokenizer(), 3, seed=seed, batch_size=2, max_new_tokens=6, request_tokens=6)
    return {"written": torch.tensor(list(json.dumps(rows.to_list()).encode()))}


def fsdp(folder: Path, rank: int) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    model = shards(tiny_llama())
    weights = trainable(model)
    assert all(
        isinstance(weight, DTensor) and weight.to_local().shape[0] == weight.shape[0] // 2
        for weight in weights.values()
    )
    found = importances(model) | {f"sketch.{name}": part for name, part in sketch(model).items()}
    found |= held(model, folder)
    copies = shards(tiny_llama(), copies=True)
    assert all(weight.device_mesh.ndim == 2 for weight in copies.parameters())
    found |= {f"copies.{name}": tensor for name, tensor in held(copies, folder / "copies").items()}
    for kind in MODELS:
        found |= {f"{kind}.{name}": tensor for name, tensor in of_head(kind).items()}
    found |= of_teacher(lora()) | written(model, seed=rank)
    assert all(isinstance(weight, DTensor) for weight in trainable(model).values())
    return found


def si(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    """Two runs of SI by hand, the second with the first one's memory: gradients, importances and figures."""
    from hf_ftplus.strategies.si import SI

    model, found = tiny_llama(), {}
    if torch.distributed.is_initialized():
        shards(model)
    weights = trainable(model)
    for read, write in ((None, folder / "memory"), (folder / "memory", folder / "more")):
        strategy = SI(strength=10.0)
        run = Run(
            model, weights, {}, lambda rows: [], torch.device("cpu"), 0, Memory(read, write), strategies=(strategy,)
        )
        strategy.prepare(run)
        run.device = torch.device("cuda")  # the way of a device that nobody waits for
        optimizer = torch.optim.SGD(weights.values(), lr=0.1)
        for batch in protect(ROWS) * 3:
            model(**batch).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
            run.clip = (0.5 / (norm + 1e-6)).clamp(max=1.0)
            run.measuring = not run.measuring
            with torch.no_grad():
                strategy.read_gradients(run), strategy.before_step(run)
                found |= {f"{write.name}.gradient.{name}": whole(weight.grad) for name, weight in weights.items()}
                optimizer.step(), strategy.after_step(run), optimizer.zero_grad()
        found |= {f"{write.name}.{name}": torch.tensor(value) for name, value in strategy.metrics().items()}
        strategy.finish(run)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        left = state.load_memory(write, "si", run)
        found |= {f"{write.name}.importance.{name}": tensor.clone() for name, tensor in left.items()}
    return found


def on_outputs(folder: Path, size: int) -> dict[str, Tensor]:
    """Weights after 3 steps of 8 rows in all, with what needs the head; under accelerate's own FSDP2 on two ranks."""
    from training import trainer
    from transformers import TrainerCallback

    class Reshard(TrainerCallback):
        def on_train_begin(self, *args, model, **kwargs):
            if hasattr(model, "set_reshard_after_forward"):
                model.set_reshard_after_forward(True)

    found = {}
    for kind, make in MODELS.items():
        for strategy in (SmallLogits(strength=0.03), Deaf(strength=0.03), EWC(strength=300, fisher="empirical")):
            it = trainer(
                folder / kind, strategy, model=make(), protect=protect(), max_steps=3, per_device_train_batch_size=size,
                optim="sgd", learning_rate=0.05, callbacks=[Reshard()],
            )  # fmt: skip
            it.train()
            found |= {f"{kind}.{strategy.name}.{name}": whole(w) for name, w in trainable(it.model).items()}
    return found


def outputs(folder: Path, rank: int) -> dict[str, Tensor]:
    import os

    from accelerate import PartialState
    from sharded import FSDP2, as_on_gpus
    from training import trainer

    os.environ |= FSDP2
    PartialState.__init__ = as_on_gpus
    found = on_outputs(folder, 4)
    it = trainer(folder, Sorry(), protect=None, max_steps=1)
    with suppress(PluginError):
        it.train()
    found |= {f"rescued.{name}": whole(weight) for name, weight in trainable(it.model).items()}
    return found | {"below an adapter": below(folder / "below", rank)}


def below(folder: Path, rank: int) -> Tensor:
    """The digest of an adapter's base, which the first rank alone has loaded."""
    from training import trainer

    it = trainer(folder, model=lora(), protect=None, max_steps=1)
    if rank:
        for weight in it.model.parameters():
            weight.data.zero_()
    found = origin.origin(it)["frozen"]
    it.train()
    assert origin.origin(it)["frozen"] is None  # accelerate may have cast it
    return torch.tensor(list(found.encode()))


def settled(folder: Path, rank: int) -> Tensor:
    """Whether the ranks begin anew where the only checkpoint was never finished, and the second looks later."""
    from types import SimpleNamespace

    from hf_ftplus.commit import WRITING
    from hf_ftplus.output import claim, settle

    out = folder / "settled"
    (out / "checkpoint-2" / WRITING).parent.mkdir(parents=True, exist_ok=True)
    (out / "checkpoint-2" / WRITING).touch()
    torch.distributed.barrier()
    time.sleep(rank)
    training = SimpleNamespace(output_dir=str(out), resume_from_checkpoint="auto")
    config = SimpleNamespace(training=training, model=SimpleNamespace(model_name_or_path="demo"))
    claim(config, probe=False)
    settle(config)
    return torch.tensor(training.resume_from_checkpoint is None)


def stopping(folder: Path, rank: int) -> dict[str, Tensor]:
    """The step at which training ends when the ranks, on unlike machines, find unlike shares kept."""
    from types import SimpleNamespace

    from training import trainer

    from hf_ftplus.evaluation import Kept
    from hf_ftplus.stopping import RetentionFalls

    shares = iter([0.97, 0.96, 0.94, 0.93] if rank == 0 else [0.94, 0.96, 0.96, 0.96])
    start = SimpleNamespace(
        evaluation=SimpleNamespace(judged=lambda: ["it"]), kept=lambda: {"it": Kept("choice", 1.0, next(shares))}
    )
    it = trainer(folder, protect=None, max_steps=10)
    it.add_callback(RetentionFalls(0.95, start, it))
    it.train()
    return {"stopping/step": torch.tensor(it.state.global_step)}


if __name__ == "__main__":
    logits.CHUNK = 2 * 384  # of rows of unlike length, so that ranks have unlike numbers of chunks
    what, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    meet(folder, rank)
    save_file(
        {"ddp": ddp, "fsdp": fsdp, "outputs": outputs, "si": si}[what](folder, rank), folder / f"rank{rank}.safetensors"
    )
    part()
