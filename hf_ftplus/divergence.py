"""Compare two models token by token over the whole vocabulary, and never hold a table of all logits.

    sum_n  w_n T^2 KL(p_n || q_n),   p = softmax(teacher's logits / T),  q = softmax(student's logits / T)

The factor T^2 keeps the gradient's size when T changes (Hinton 2015). What is kept of a model until the comparison is
its hidden states [N, d]; logits [n, V] exist for some positions at a time. The gradient of each chunk,

    d/dz = w T (q - p)    at the student's logits z,

is known as soon as the chunk is, so it is carried on to the hidden states and the LM head at once, and `backward` only
scales it: one projection of the student and one of the teacher instead of two each, and memory O(chunk x V) throughout.
On devices with Triton, TRL's fused kernels do the same without any table in between; on a CPU they project twice and
take 1.6 (head trained) to 2.4 times as long (256 tokens, d 576, V 49152).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .logits import Head

ELEMENTS, DEVICE_ELEMENTS = 2**23, 2**25
"""Logits of one model held at a time: on a CPU 32 MB in fp32, elsewhere 128; five such tables are in use at once."""
FAR = 20.0
"""log q - log p above which terms of the KL are summed in a way that cannot overflow."""

Compare = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""`compare(part, z)`: KL [n] at positions `part`, and q - p [n, V]; z are the student's logits / T, its to spoil."""


def forward_kl(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of w T^2 KL(teacher || student) with graph, KL of each token in nats without): scalar and [N].

    Args:
        hidden, teacher_hidden: last hidden states at the same N positions, [N, d] and [N, d'].
        head, teacher_head: LM heads over the same tokens; gradients reach the student's alone.
        temperature: T, of both.
        weights: w, [N] in fp32; 1 if left out.
    """
    if fused(hidden.device):
        return _with_trl(hidden, head, teacher_hidden, teacher_head, temperature, weights)
    theirs = _in_compute_dtype(teacher_head, teacher_hidden)

    def compare(part: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = _tempered(theirs(teacher_hidden[part]), temperature).log_softmax(-1), z.log_softmax(-1)
        p = log_p.exp()
        x = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        return _kl(p, q, x), q.sub_(p)

    return _summed(hidden, head, compare, temperature, weights)


def bucketed_kl(
    hidden: Tensor,
    head: Head,
    tokens: Tensor,
    log_probs: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same against what `likeliest` kept: k tokens of each position, all others in one bucket.

    Putting outcomes together can only hide a difference: this is a lower bound of `forward_kl`, and equal to it when
    k = V. Inside the bucket the student is free, as long as its total is the teacher's.
    """

    def compare(part: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        kept, log_p = tokens[part].long(), log_probs[part].float().log_softmax(-1)  # rounded on disk: sum to 1 again
        log_q, log_z = _outcomes(z, kept)  # leaves -inf in z at the kept tokens
        p, q = log_p.exp(), log_q.exp()
        kl = _kl(p, q, torch.where(p > 0, log_q - log_p, 0.0))
        g = z.sub_(log_z).exp_().mul_(torch.where(q[:, -1:] > 0, 1 - p[:, -1:] / q[:, -1:], 0.0))
        return kl, g.scatter_(-1, kept, (q - p)[:, :-1])

    return _summed(hidden, head, compare, temperature, weights)


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, count: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens [N, k] (int32) and log-probabilities [N, k + 1] (fp16) of the k likeliest and of all others together."""
    head = _in_compute_dtype(head, hidden)
    count = min(count, head.weight.shape[0])
    tokens = torch.empty(len(hidden), count, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(len(hidden), count + 1, dtype=torch.float16, device=hidden.device)
    for part in head.chunks(len(hidden), _elements(hidden.device)):
        z = _tempered(head(hidden[part]), temperature)
        kept = z.topk(count, dim=-1).indices
        tokens[part], log_probs[part] = kept.int(), _outcomes(z, kept)[0].half()
    return tokens, log_probs


def _elements(device: torch.device) -> int:
    return ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS


def fused(device: torch.device) -> bool:
    """Whether TRL's kernels run as Triton kernels there."""
    from transformers.utils import is_triton_available

    return device.type in ("cuda", "xpu") and is_triton_available()


def _with_trl(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, temperature: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`forward_kl` by TRL's tiled kernels, which take any two heads and give the KL of each token."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if not len(hidden):
        return hidden.sum() * 0.0, hidden.new_zeros(0, dtype=torch.float32)
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, head.weight, head.bias, teacher_hidden, teacher_head.weight, teacher_head.bias,
        0.0, temperature, head.scale, head.softcap, teacher_head.scale, teacher_head.softcap,
    )  # fmt: skip
    return temperature**2 * (kl if weights is None else kl * weights).sum(), kl.detach()


def _summed(
    hidden: Tensor, head: Head, compare: Compare, temperature: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _Summed.apply(hidden, head.weight, head.bias, head, compare, temperature, weights)


class _Summed(torch.autograd.Function):
    """Sum and gradient in one pass over chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        compare: Compare,
        temperature: float,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ours = _in_compute_dtype(head, hidden)
        dtype, device, wanted = ours.weight.dtype, hidden.device, ctx.needs_input_grad
        kl = torch.zeros(len(hidden), device=device)
        factors = ours.scale * temperature * (torch.ones_like(kl) if weights is None else weights)
        grads = [
            torch.zeros(tensor.shape, device=device) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), wanted, strict=False)
        ]
        for part in ours.chunks(len(hidden), _elements(device)):
            states = hidden[part].to(dtype)
            z = ours(states)
            slope = None if ours.softcap is None else 1 - (z / ours.softcap).square_()
            kl[part], g = compare(part, _tempered(z, temperature))
            g = (g if slope is None else g.mul_(slope)).to(dtype)
            factor = factors[part].unsqueeze(-1)  # of each position: cheaper on [n, d] than on [n, V]
            if grads[0] is not None:
                grads[0][part] = (g @ ours.weight) * factor
            if grads[1] is not None:
                states = (states * factor).to(dtype)
                grads[1].addmm_(g.T, states) if dtype == torch.float32 else grads[1].add_(g.T @ states)
            if grads[2] is not None:
                grads[2].add_((g * factor).sum(0))
        ctx.save_for_backward(*grads)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(kl)
        return temperature**2 * (kl if weights is None else kl * weights).sum(), kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


def _in_compute_dtype(head: Head, hidden: Tensor) -> Head:
    """The head whole, without graph, and in the type that this forward pass multiplies in: cast once, not per chunk."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = head.bias if head.bias is None else head.bias.detach().to(dtype)
    return replace(head, weight=head.weight.detach().to(dtype), bias=bias)


def _kl(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """sum_v p_v (e^x_v - 1 - x_v) with x = log q - log p: the KL, since p and q sum to 1, but no term is negative.

    The textbook sum of p log(p / q) cancels down to the rounding of two logarithms, 1e-7 nats either side of zero,
    which is all there is near the start. x is spoilt.
    """
    near = x.clamp(max=FAR).expm1_().sub_(x).mul_(p)  # vecdot would be a product in bf16 under autocast
    far = torch.add(q, p, alpha=-math.exp(FAR), out=x).relu_()  # what p e^x has beyond e^FAR, where it would overflow
    return near.add_(far).sum(-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits.div_(temperature)


def _outcomes(z: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the `kept` tokens [n, k] and of all others together, [n, k + 1], and log sum exp z [n, 1].

    `z` has -inf at the kept tokens afterwards. The rest is summed up itself: 1 - (the kept) would be all rounding error
    where a model is sure of itself.
    """
    top = z.gather(-1, kept)
    rest = z.scatter_(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    both = torch.cat([top, rest], -1)
    log_z = both.logsumexp(-1, keepdim=True)
    return both - log_z, log_z
