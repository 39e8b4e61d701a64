"""Ask a teacher what it says at every supervised token of a micro-batch, and prove that it is not the student.

Three teachers, all used alike: `teacher(batch) -> (hidden [N, d], its LM head)`, without graph and without dropout.

- `AdapterOff`: the starting model is the model without its LoRA adapter. Costs nothing; right only while B was 0.
- `Frozen`: the starting model is the same module with copies of the trained weights put in for the length of the
  call. Frozen weights and buffers are shared. The copies may be smaller than the weights, or lie on the CPU: then each
  layer gets its own just before it runs, so that one layer at a time is held twice.
- `Other`: another model with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .errors import DataError, IncompatibleError, UsageError, reason
from .logits import Head, UnseenError, evaluating, hidden_states, lm_head
from .model import resolve
from .weights import canonical

PROBE_TOKENS = 8


class Teacher:
    """Whoever answers. Subclasses say how the model is turned into the teacher, and back."""

    vocabulary: int | None = None
    """Tokens that teacher and student both know, where one of them pads its LM head; None: all."""
    checked: bool = False
    """Whether its LM head was seen to give its own logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Head]:
        """Last hidden states that predict the supervised tokens, [N, d], and the head that reads them."""
        with torch.no_grad():
            return self.answer(batch)

    def answer(self, batch: dict[str, Any]) -> tuple[Tensor, Head]:
        """The same, recording a graph if the caller does: there is nothing to record, unless a student listens."""
        device = next(self.model.parameters()).device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with evaluating(self.model), self.taking_the_chair():
            hidden, _ = hidden_states(self.model, batch, check=not self.checked)
            self.checked = True
            return hidden, first_tokens(lm_head(self.model).whole(), self.vocabulary)

    @contextmanager
    def taking_the_chair(self) -> Iterator[None]:
        """The model is the teacher inside the block, and what it was after it."""
        yield

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run cannot make again."""
        return {}

    def bytes(self) -> int:
        """Memory that the teacher takes beside the student."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class AdapterOff(Teacher):
    """The model without its LoRA adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def taking_the_chair(self) -> Iterator[None]:
        # PEFT's own `disable_adapter` walks all modules for a status report and rewrites requires_grad, at every call
        before = [layer._disable_adapters for layer in self.layers]
        try:
            for layer in self.layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in zip(self.layers, before, strict=True):
                layer._disable_adapters = was


class Frozen(Teacher):
    """The model with copies of its trained weights in their place.

    Args:
        weights: the trained weights by canonical name.
        copies: what `copied` made of them, or a checkpoint gave back.
    """

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], copies: dict[str, Tensor]) -> None:
        super().__init__(model)
        self.copies, self.like = copies, weights
        names = {id(weight): name for name, weight in weights.items()}
        self.seats = [
            (module, key, names[id(weight)])
            for module in model.modules()  # by module and not by name: a tied weight has two seats
            for key, weight in module._parameters.items()
            if id(weight) in names
        ]
        ready = all(self._is_ready(name) for name in weights)
        blocks = [] if ready else [child for parent in outermost_lists(model) for child in parent]
        owner = {module: block for block in blocks for module in block.modules()}
        self.resident = [seat for seat in self.seats if seat[0] not in owner]
        self.by_block: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {block: [] for block in blocks}
        for seat in self.seats:
            if seat[0] in owner:
                self.by_block[owner[seat[0]]].append(seat)

    @contextmanager
    def taking_the_chair(self) -> Iterator[None]:
        live = [(module, key, module._parameters[key]) for module, key, _ in self.seats]
        hooks = []
        try:
            self._seat(self.resident)
            for block, seats in self.by_block.items():
                hooks.append(block.register_forward_pre_hook(lambda *_, seats=seats: self._seat(seats)))
                hooks.append(block.register_forward_hook(lambda *_, seats=seats: self._unseat(seats)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, key, weight in live:
                module._parameters[key] = weight

    def tensors(self) -> dict[str, Tensor]:
        return self.copies

    def _seat(self, seats: list[tuple[nn.Module, str, str]]) -> None:
        made: dict[str, Tensor] = {}
        for module, key, name in seats:
            made[name] = made[name] if name in made else self._restored(name)
            module._parameters[key] = made[name]

    def _unseat(self, seats: list[tuple[nn.Module, str, str]]) -> None:
        """A layer that has run lets its weights go."""
        for module, key, name in seats:
            module._parameters[key] = self.like[name]

    def _is_ready(self, name: str) -> bool:
        copy, like = self.copies[f"start.{name}"], self.like[name]
        return copy.dtype == like.dtype and copy.device == like.device

    def _restored(self, name: str) -> Tensor:
        """The weight as it was, in the type and on the device that the model computes with."""
        copy, like = self.copies[f"start.{name}"], self.like[name]
        if self._is_ready(name):
            return copy
        copy = copy.to(like.device, non_blocking=True)
        if copy.dtype == torch.int8:
            copy = copy.float() * self.copies[f"scale.{name}"].to(like.device, non_blocking=True)
        return copy.to(like.dtype)


class Other(Teacher):
    """Another model, larger or smaller, over the same tokens."""

    def bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())


def copied(weights: dict[str, nn.Parameter], dtype: str, device: str) -> dict[str, Tensor]:
    """Copies of the trained weights, as state: `start.NAME`, and `scale.NAME` for int8; one by one to where they stay.

    Matrices alone are made smaller: norms and biases are a thousandth of the bytes and carry more of the answer. int8
    is the nearest of 255 levels between -max and max of each row, so a row's largest weight is exact.

    Raises:
        IncompatibleError: the weights are sharded.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        _refuse_shards(name, weight)
        copy = live = weight.detach()
        if copy.dim() >= 2 and dtype == "int8":
            scale = (copy.float().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            found[f"scale.{name}"], copy = kept_on(scale, device), (copy.float() / scale).round().to(torch.int8)
        elif copy.dim() >= 2 and dtype == "bfloat16":
            copy = copy.to(torch.bfloat16)
        copy = kept_on(copy, device)
        found[f"start.{name}"] = copy.clone() if copy is live else copy
    return found


def bytes_of_copies(weights: dict[str, nn.Parameter], dtype: str) -> int:
    """What `copied` will take."""
    each = {"same": None, "bfloat16": 2, "int8": 1}[dtype]
    total = 0
    for weight in weights.values():
        smaller = each is not None and weight.dim() >= 2
        total += weight.numel() * (each if smaller else weight.element_size())
        total += 4 * weight.numel() // weight.shape[-1] if smaller and dtype == "int8" else 0
    return total


def kept_on(copy: Tensor, device: str) -> Tensor:
    """Where it is, or on the CPU, pinned if that makes the way back faster."""
    if device != "cpu" or copy.device.type == "cpu":
        return copy
    return copy.cpu().pin_memory() if copy.device.type == "cuda" else copy.cpu()


def given_back(state: dict[str, Tensor], weights: dict[str, nn.Parameter], device: str) -> dict[str, Tensor]:
    """Copies out of a checkpoint, where `copied` would have put them.

    Raises:
        IncompatibleError: the weights are sharded now.
    """
    for name, weight in weights.items():
        _refuse_shards(name, weight)
    return {name: kept_on(copy.to(weights[name.partition(".")[2]].device), device) for name, copy in state.items()}


def _refuse_shards(name: str, weight: Tensor) -> None:
    if hasattr(weight, "to_local"):
        raise IncompatibleError(
            f"distill cannot put a frozen copy in the place of {name}: FSDP2 gathers its own shards into the module. "
            "Set cache=true, which asks the starting model before training and keeps its answers, train a LoRA "
            "adapter, or launch with --accelerate_config multi_gpu."
        )


def adapter_is_zero(model: nn.Module, weights: dict[str, nn.Parameter]) -> bool:
    """Whether switching LoRA off gives the starting model: all that trains is A and B, and every active B is 0."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = [(layer, key) for layer in layers for key in layer.active_adapters]
    plain = all(not layer.merged and layer.lora_variant.get(key) is None for layer, key in active)
    outputs = [parts[key] for layer, key in active for parts in (layer.lora_B, layer.lora_embedding_B) if key in parts]
    tensors = [tensor for part in outputs for tensor in _tensors_of(part)]
    zero = not any(bool(tensor.any()) for tensor in tensors if not tensor.is_meta)  # of a plan: as it will be made
    return plain and zero and bool(active) and only_lora(weights)


def only_lora(weights: dict[str, nn.Parameter]) -> bool:
    """Whether all that trains is the A and B of LoRA adapters."""
    return all(".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name for name in weights)


def _tensors_of(part: nn.Module | Tensor) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else list(part.parameters())


def load_other(name: str, model: nn.Module, tokenizer: Any, device: torch.device, dtype: str) -> Other:
    """Another model as the teacher of `model`, on `device`.

    Raises:
        IncompatibleError: its tokens are not the student's; names the first that differs.
        DataError: it cannot be loaded.
        UsageError: the trainer has no tokenizer to compare tokens with.
    """
    from transformers import AutoModelForCausalLM

    config, known = getattr(model, "config", None), fitting_tokenizer(name, tokenizer)
    with loading(name):
        teacher = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=torch.bfloat16 if dtype == "bfloat16" else "auto",
            attn_implementation=getattr(config, "_attn_implementation", None),  # packing means the same to both
        )
    other = Other(teacher.to(device).requires_grad_(False))
    sizes = lm_head(model).weight.shape[0], lm_head(teacher).weight.shape[0]
    other.vocabulary = common_vocabulary(*sizes, max(known.get_vocab().values()) + 1, name)
    return other


def config_of(name: str) -> Any:
    """The config of a teacher: all of it that is cheap to look at.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoConfig

    with loading(name):
        return AutoConfig.from_pretrained(resolve(name))


def fitting_tokenizer(name: str, student: Any) -> Any:
    """The tokenizer of a teacher, which means the same by every token as the student's.

    Raises:
        DataError: it cannot be loaded.
        IncompatibleError, UsageError: see `same_tokens`.
    """
    from transformers import AutoTokenizer

    with loading(name):
        known = AutoTokenizer.from_pretrained(resolve(name))
    same_tokens(student, known, name)
    return known


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever keeps a teacher from being loaded, as a DataError that names it."""
    try:
        yield
    except (DataError, OSError, ValueError) as error:
        raise DataError(
            f"distill cannot load the teacher {name!r}: {reason(error)} Type --set distill.teacher=FOLDER with a "
            "causal LM and its tokenizer, or the name of one on the Hub; or leave it out for the starting model."
        ) from error


def bytes_of_other(name: str, dtype: str) -> int:
    """Bytes that another model will take, from its config alone."""
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    each = 2 if dtype == "bfloat16" else (getattr(config, "dtype", None) or torch.float32).itemsize
    return each * sum(weight.numel() for weight in model.parameters())


def same_tokens(student: Any, teacher: Any, name: str) -> None:
    """Demand that every token id means the same to both; sizes alone prove nothing.

    Raises:
        UsageError: the student has no tokenizer.
        IncompatibleError: names the first token that differs.
    """
    if student is None:
        raise UsageError(
            f"distill cannot compare the tokens of the teacher {name!r}: the trainer has no tokenizer. Give it "
            "processing_class=tokenizer."
        )
    ours, theirs = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    differ = [id for id in sorted(ours.keys() | theirs.keys()) if ours.get(id) != theirs.get(id)]
    if differ:
        first = differ[0]
        here, there = (repr(known[first]) if first in known else "nothing" for known in (ours, theirs))
        raise IncompatibleError(
            f"The teacher {name!r} has other tokens: {first} means {there} to it and {here} to the student "
            f"({len(differ)} of {len(ours.keys() | theirs.keys())} differ). Distillation compares probabilities token "
            "by token; choose a teacher with the student's tokenizer, or leave distill.teacher out."
        )


def common_vocabulary(student: int, teacher: int, tokens: int, name: str) -> int | None:
    """LM head rows to compare: all of them, or, where one head is padded further than the other, those of both."""
    if student == teacher:
        return None
    if min(student, teacher) < tokens:
        raise IncompatibleError(
            f"The LM heads have {student} (student) and {teacher} rows (teacher {name!r}) for a tokenizer of {tokens} "
            "tokens; expected a row for every token in both."
        )
    return min(student, teacher)


def first_tokens(head: Head, count: int | None) -> Head:
    """The head cut to its first `count` rows."""
    if count is None or count == head.weight.shape[0]:
        return head
    return replace(head, weight=head.weight[:count], bias=None if head.bias is None else head.bias[:count])


def content(teacher: Teacher) -> dict[str, Tensor]:
    """The tensors that decide what a teacher says, under names that do not depend on who wrapped the model."""
    found: dict[str, Tensor] = {}
    for name, tensor in teacher.model.state_dict().items():
        if not (isinstance(teacher, AdapterOff) and "lora_" in name):
            found[name if canonical(name) in found else canonical(name)] = tensor  # two adapters share canonical names
    return found


def prove(teacher: Teacher, weights: dict[str, nn.Parameter]) -> None:
    """Show that no trained weight has a part in what the teacher says: autograd would know.

    A teacher that is the student in disguise (a deep copy whose patched forward still calls the original, an adapter
    that a wrapper keeps on) agrees with it for ever, and distilling from it does nothing without a word.

    Raises:
        IncompatibleError: a trained weight has a part in it, or shares memory with the teacher; names it.
    """
    ids = torch.arange(1, PROBE_TOKENS + 1, device=next(teacher.model.parameters()).device).unsqueeze(0)
    with torch.enable_grad():
        try:
            hidden, head = teacher.answer({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        except UnseenError as error:
            raise IncompatibleError(
                "The teacher of distill answers without running its own layers: something replaced its forward by "
                "another model's, as a deep copy of a model that a trainer has patched does. Load it from its folder: "
                "--set distill.teacher=FOLDER."
            ) from error
        outputs = [it.float().sum() for it in (hidden, head.weight, head.bias) if it is not None and it.requires_grad]
        grads = (
            torch.autograd.grad(sum(outputs), list(weights.values()), allow_unused=True)
            if outputs
            else [None] * len(weights)
        )
    memory = {tensor.untyped_storage().data_ptr() for tensor in teacher.tensors().values()}
    live = [
        name
        for (name, weight), gradient in zip(weights.items(), grads, strict=True)
        if gradient is not None or (memory and weight.untyped_storage().data_ptr() in memory)
    ]
    if live:
        raise IncompatibleError(
            f"The teacher of distill is the live student: what it says depends on {len(live)} of {len(weights)} "
            f"trained weights ({live[0]}, ...). Something replaced the model's forward or its layers; train without it "
            "(Unsloth, Liger, patches of your own), set cache=true, or name another teacher."
        )


def outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of layers that are not inside another list."""
    found: list[nn.ModuleList] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found
