"""How much each weight matters for what the model says now: the diagonal of the Fisher information, per token.

    F_i = E_x E_{y ~ p(.|x)} [ (d log p(y|x) / d w_i)^2 ]        so that   KL(w || w + d) ~ 1/2 sum_i F_i d_i^2

Three estimators; they differ in what is back-propagated at the logits of each supervised token (p = softmax):

- `sign` (default): v = sqrt(p) * e - p * (sqrt(p) . e) with random signs e in {-1, +1}^V. Cov(v) = diag(p) - p p^T, the
  exact logit Fisher, and v is independent between tokens, so the square of the gradient of a *summed* batch is unbiased
  for any batch size, with padding or packing, and does not collapse on a confident model.
- `sampled`: v = onehot(y) - p with y ~ p. Unbiased too, but a confident model hardly ever draws a y that tells much.
- `empirical`: v = onehot(label) - p, one example at a time. Not the Fisher (Kunstner 2019) but what many papers use.

Everything is accumulated in fp32 and divided by the number of supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import DataError, IncompatibleError
from .formats import IGNORED
from .logits import evaluating, hidden_states, lm_head, stay_whole
from .weights import Adapter, local, ranks, sharded

Batches = list[dict[str, Tensor]]

FEW_TOKENS = 64
"""Tokens of a micro-batch, padding included, up to which row and column sums under LoRA are exact."""
SIGNS = 16
"""Random signs that row and column sums of more tokens are averaged over: a relative variance of 2/16 for each
micro-batch, beside the 2 that the square of one random gradient has anyway."""


@dataclass
class Fisher:
    """Fisher information per supervised token, in fp32: nats per squared unit of weight.

    `diagonal[name]` has the shape, and the sharding, of the weight. Of a LoRA target's frozen weight W [d, k] only the
    sums over rows [d] and over columns [k] are kept, which stand for F_ij = rows_i * columns_j / sum(rows) (the
    rank-one form of Adafactor, Shazeer 2018). All of them add up over data and runs.
    """

    diagonal: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under a name of its own."""
        for kind in ("diagonal", "rows", "columns"):
            yield from ((f"{kind}.{name}", tensor) for name, tensor in getattr(self, kind).items())


def fisher(
    model: nn.Module,
    batches: Batches,
    weights: dict[str, nn.Parameter],
    adapters: dict[str, Adapter] | None = None,
    *,
    estimator: str = "sign",
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Fisher:
    """Fisher information of `weights`, and of the frozen weights below `adapters`, on supervised tokens of `batches`.

    Args:
        model: a causal LM on its device, possibly sharded with FSDP2; its mode, gradients and RNG are left as found.
        batches: micro-batches with `input_ids`, `labels` [B, T] and masks. Each rank takes its share of them.
        weights, adapters: as `weights.split(model)` gives them.
        estimator: "sign", "sampled" or "empirical".
        seed: of the signs or samples; they come from a generator of their own.
        autocast: mixed precision of training, so that the pass costs what a training step costs.

    Raises:
        DataError: no supervised token in `batches`.
        IncompatibleError: the result is not finite; names the weight.
    """
    adapters = adapters or {}
    rank, world = ranks()
    # FSDP2 averages gradients over ranks while reducing; the Fisher wants their sum
    parted = sharded(weights.values())
    batches = _by_row(batches) if estimator == "empirical" else batches
    result = Fisher(
        diagonal={name: torch.zeros_like(weight.detach(), dtype=torch.float32) for name, weight in weights.items()}
    )
    generator = torch.Generator(device=next(model.parameters()).device)
    tokens = torch.zeros((), dtype=torch.long, device=generator.device)

    # Around all batches: autocast drops its copies of the weights when its outermost block ends. Shards come and go.
    once = nullcontext if parted else autocast
    with once(), _undisturbed(model), row_column_sums(adapters, generator) as sums:
        mine = progress(_shares(batches, rank, world, parted, apart=estimator == "empirical"))
        for number, (index, batch) in enumerate(mine):
            generator.manual_seed(seed * 1_000_003 + index)  # of the batch: the same on any number of ranks
            tokens += backward_logits(model, batch, estimator, generator, autocast, check=number == 0)
            for name, weight in weights.items():
                if weight.grad is not None:
                    gradient = local(weight.grad).float()
                    local(result.diagonal[name]).addcmul_(gradient, gradient, value=float(world**2 if parted else 1))
                weight.grad = None

    for name, (rows, columns) in sums.items():
        result.rows[name], result.columns[name] = rows, columns
    if world > 1:
        _reduce(result, tokens, parted)
    result.tokens = int(tokens)
    _normalise(result)
    return result


def backward_logits(
    model: nn.Module,
    batch: dict[str, Tensor],
    estimator: str,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    check: bool = False,
) -> Tensor:
    """Back-propagate the estimator's v through the summed batch into `.grad`; returns the supervised tokens' number.

    `check`: see before that the LM head gives the model's own logits.
    """
    batch = {key: value.to(generator.device) for key, value in batch.items()}
    with torch.enable_grad(), autocast():
        hidden, labels = hidden_states(model, batch, check)
        stay_whole(model)
        leaf, head = hidden.detach().requires_grad_(), lm_head(model)
        if not len(labels):
            head(leaf).sum().backward()  # a gradient of zeros: all ranks of a sharded model must have one
        for part in head.chunks(len(labels)):
            logits = head(leaf[part])
            logits.backward(logit_gradient(logits.detach(), labels[part], estimator, generator))
    hidden.backward(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
    return (batch["labels"][:, 1:] != IGNORED).sum()


def logit_gradient(logits: Tensor, labels: Tensor, estimator: str, generator: torch.Generator) -> Tensor:
    """What an estimator back-propagates at logits [n, V]: a random (for `empirical`, a given) v with mean square F."""
    probs = logits.softmax(-1)
    if estimator == "sign":
        signed = random_signs(probs.shape, generator).mul_(probs.sqrt())
        return signed.addcmul_(probs, signed.sum(-1, keepdim=True), value=-1)
    target = labels if estimator == "empirical" else torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    return nn.functional.one_hot(target, probs.shape[-1]).to(probs.dtype) - probs


def random_signs(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Independent -1 / +1 of the given shape [..., V], eight to a random byte."""
    *lead, last = shape
    packed = torch.randint(
        0, 256, (*lead, -(-last // 8)), dtype=torch.uint8, device=generator.device, generator=generator
    )
    bits = torch.arange(256, device=packed.device).unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
    signs_of = bits.to(torch.float32) * 2 - 1  # [256, 8]: looked up, which is one pass over [..., V] instead of five
    return nn.functional.embedding(packed.int(), signs_of).flatten(-2)[..., :last]


@contextmanager
def row_column_sums(
    adapters: dict[str, Adapter], generator: torch.Generator
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect, for each LoRA target, row and column sums of G*G with G = sum_t delta_t x_t^T, the gradient of W [d, k].

    W is frozen and maybe quantised, so G is made from the layer's input x and the gradient delta of its output, and
    never kept, nor even formed: the row sums of few tokens are diag(D^T (X X^T) D); of many they are the mean of
    (D^T X z)^2 over random signs z, since E[z z^T] = 1 (Hutchinson 1990), at 2 N (d + k) a sign instead of N d k.
    """
    # every target from the start: a rank without a batch takes part in the reduction all the same
    sums = {
        name: (
            adapter.B.new_zeros(adapter.B.shape[0], dtype=torch.float32),
            adapter.A.new_zeros(adapter.A.shape[1], dtype=torch.float32),
        )
        for name, adapter in adapters.items()
    }

    def add(name: str, x: Tensor, delta: Tensor) -> None:
        if len(x) <= FEW_TOKENS:
            rows, columns = (delta * (x @ x.T @ delta)).sum(0), (x * (delta @ delta.T @ x)).sum(0)
        else:
            rows, columns = (
                (one.T @ (other @ random_signs((other.shape[-1], SIGNS), generator))).square().mean(1)
                for one, other in ((delta, x), (x, delta))
            )
        sums[name] = (sums[name][0] + rows, sums[name][1] + columns)

    with watching({name: adapter.layer for name, adapter in adapters.items()}, add):
        yield sums


@contextmanager
def watching(layers: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call see(name, x, delta) whenever a gradient comes to a layer: its input x [N, k] and the gradient delta [N, d]
    of its output, in fp32 and out of reach of autocast, so that products of them are in fp32, too.

    Until then inputs are held as the layers hold theirs: those of checkpointed layers are not, but made anew.
    """

    def watch(name: str) -> Callable:
        def forward_hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                node = _Saved.apply(torch.empty(0, requires_grad=True), args[0].detach()).grad_fn
                output.register_hook(lambda gradient: tell(name, node, gradient))

        return forward_hook

    def tell(name: str, node: Any, gradient: Tensor) -> None:
        (inputs,) = node.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            see(name, inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float())

    hooks = []
    try:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(watch(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Saved(torch.autograd.Function):
    """A node of no graph that saves a tensor: checkpointing that is not reentrant drops it, and makes it anew.

    Nothing goes through it: behind a layer, a model could no longer change the layer's output in place.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty_like(anchor)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the block; mode and gradients come back as they were.

    Layers that checkpoint their activations do so only in training mode, so they alone keep it: the pass then needs no
    more memory than a training step.
    """
    checkpointing = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False)]
    gradients = {weight: weight.grad for weight in model.parameters()}
    dropout = any("drop" in key and isinstance(value, float) and value > 0 for key, value in vars(model.config).items())
    with evaluating(model):
        for module in checkpointing:
            module.training = not dropout
        for weight in gradients:
            weight.grad = None
        try:
            yield
        finally:
            for weight, gradient in gradients.items():
                weight.grad = gradient


def _by_row(batches: Batches) -> Batches:
    """The same rows, one to a batch."""
    if any("position_ids" in batch for batch in batches):
        raise IncompatibleError(
            "fisher='empirical' squares the gradient of one example at a time, but these batches are padding-free "
            "(several examples in one row). Use --set ewc.fisher=sign, which needs no examples apart."
        )
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


def _shares(batches: Batches, rank: int, world: int, sharded: bool, apart: bool) -> list[tuple[int, dict[str, Tensor]]]:
    """This rank's batches, numbered. Sharded models run every forward together: short shares are filled, unsupervised.

    Gradients of a sharded model are summed over ranks before they are squared. That is harmless for random v, whose
    cross terms vanish in the mean; examples that must be squared `apart` take turns.
    """
    places = range(len(batches))
    if sharded and apart:
        return [(i, batches[i] if i % world == rank else _unsupervised(batches[i])) for i in places]
    mine = [(i, batches[i]) for i in places[rank::world]]
    short = sharded and len(mine) < -(-len(batches) // world)
    return [*mine, (len(batches), _unsupervised(batches[0]))] if short else mine


def _unsupervised(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _reduce(result: Fisher, tokens: Tensor, sharded: bool) -> None:
    """Sum over ranks what each one gathered alone; shards already hold the sum."""
    dist.all_reduce(tokens)
    for name, tensor in result.named():
        if not (sharded and name.startswith("diagonal.")):
            dist.all_reduce(tensor)


def _normalise(result: Fisher) -> None:
    """Divide by tokens; refuse what is not finite."""
    if not result.tokens:
        raise DataError("No supervised token in the protect data; expected completions that survive truncation.")
    for name, tensor in result.named():
        local(tensor).div_(result.tokens)
        if not torch.isfinite(local(tensor).sum()):  # nothing in it is negative, so one sum tells
            raise IncompatibleError(
                f"The Fisher information of {name} is not finite. The starting model, or its precision, is broken: "
                "load it in float32 or bfloat16, train in bf16 or fp32 instead of fp16, and check that its loss on the "
                "protect data is finite."
            )
