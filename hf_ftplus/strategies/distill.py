"""Distillation: keep saying what a teacher says, token by token; by default what the starting model said.

    loss = task loss on learn + strength * T^2 * KL(teacher || student),  mean per token, both at temperature T

- on protect tokens (KL replay): hold the answers on data that stands for what must not be forgotten, the model's own
  text (`--protect self:256`) included. This is what is meant to be kept, and it leaves the learn rows alone.
- on learn tokens (learning without forgetting, Li and Hoiem 2016): needs no data, but pulls against what is being
  learnt, and says nothing about what the learn rows do not touch.

With `on=auto` it is protect where there is protect data, learn otherwise: on two tasks that share no words (figures at
`USUAL`) KL on protect keeps all of the first at no cost to the second, KL on learn half of it at some cost.

The starting model costs no memory under LoRA (the adapter switched off), one copy of the trained weights in
full fine-tuning, which is also what a checkpoint must hold to be resumed, and nothing with `cache`.

Protect rows are read beside the learn rows, `share` of a row for each, drawn anew at every step (`beside.py`). Row p
stands beside a learn row of n tokens with

    n / share * (KL summed over p) / (tokens of a mean protect row),

which adds up, per learn token, to the mean KL per protect token of its task in expectation, tasks drawn alike.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DataError, IncompatibleError, UsageError
from ..formats import IGNORED
from ..hookspecs import hookimpl
from ..strategy import Batch, Run, Strategy, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..examples import Example
    from ..teacher import Teacher

    Batches = list[dict[str, Tensor]]

logger = logging.getLogger("hf_ftplus")

START = "start"
ADDED = "added"
"""What is summed up beside the places that are compared: what the loss got, and learn tokens."""
USUAL = {"protect": 3.0, "learn": 0.3}
"""Strengths if none is given, measured on a toy (tests/test_distill.py) where plain fine-tuning goes from 0.8 to 6.0
nats on the first of two tasks and to 0.5 on the second. On protect, 1 to 10 keep the first at 0.57 and learn the second
as well; 30 learns less (0.8). On learn 0.3 ends at 2.7 and 0.67, 1 at 2.5 and 1.15. Published: 1 to 10; 0.1 to 1."""


@dataclass
class Distill(Strategy):
    """Knowledge distillation: keep saying what the starting model, or another teacher, says."""

    name: ClassVar[str] = "distill"

    strength: float | None = setting(
        None,
        f"what a nat of KL per token costs, in nats of learn loss; left out: {USUAL['protect']:g} on protect "
        f"tokens, {USUAL['learn']:g} on learn tokens",
        unit="nats per nat",
        low=0,
    )
    on: str = setting(
        "auto",
        "tokens to compare at; auto: protect if there is protect data, else learn",
        choices=("auto", "learn", "protect", "both"),
    )
    teacher: str = setting(START, "start, the starting model, or a folder or Hub name of a model with the same tokens")
    temperature: float = setting(
        1.0, "above 1 the unlikely tokens count for more; 1 is drift itself", unit="of the softmax", above=0
    )
    share: float = setting(
        0.25,
        "protect rows read beside each learn row; each costs 4/3 of a learn row",
        unit="protect rows per learn row",
        above=0,
    )
    cache: bool = setting(False, "ask the teacher once, before training, and keep its answers on disk for later runs")
    top_k: int = setting(64, "likeliest tokens kept in the cache; all others count as one", unit="tokens", low=1)
    teacher_dtype: str = setting(
        "same",
        "of the teacher's matrices; bfloat16 and int8 (starting model only) take less memory and cost some exactness",
        choices=("same", "bfloat16", "int8"),
    )
    teacher_device: str = setting(
        "same", "cpu: the frozen copy waits there, each layer is sent over when it runs", choices=("same", "cpu")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher != START and (self.teacher_dtype == "int8" or self.teacher_device == "cpu"):
            raise UsageError(
                f"teacher_dtype=int8 and teacher_device=cpu are for a copy of the starting model; distill.teacher is "
                f"{self.teacher!r}. Leave them out: teacher_dtype=bfloat16 works for any teacher, and with cache=true "
                "it leaves before training."
            )

    def refuse(self, run: Run | None) -> None:
        """A teacher that is not there or has other tokens, nothing to protect, and adapters that add virtual tokens."""
        from ..teacher import config_of, fitting_tokenizer

        if self.strength == 0:
            return
        if run is not None:
            self._check(run)
        if self.teacher != START:
            if run is None:
                config_of(self.teacher)
            else:
                fitting_tokenizer(self.teacher, run.tokenizer)

    def preview(self, run: Run) -> dict[str, float]:
        """Bytes of the teacher, or of its answers to the protect data, and the seconds it takes to have them."""
        from ..answers import Answers, bytes_per_token
        from ..asking import key_of_answers, seconds_to_ask
        from ..model import cache as cache_folder
        from ..teacher import adapter_is_zero, bytes_of_copies, bytes_of_other

        self._bind(run)
        rows = {"rows": sum(len(batch["labels"]) for batch in self._protect(run))} if self.protecting else {}
        if self.off:
            return {**rows, "bytes": 0.0, "seconds": 0.0}
        if self.cache and (self.learning or self.teacher != START or run.device.type == "meta"):
            return rows  # what there is to ask, or whom, is not known yet, or nobody is there to answer
        if self.cache:
            teacher = self._starting(run)
            kept = Answers(cache_folder() / "teacher" / key_of_answers(teacher, run, self.top_k, self.temperature))
            wanted = [batch for batch in self._protect(run) if kept.lacks(batch)]
            tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in wanted)
            seconds = seconds_to_ask(teacher, wanted, run, self.top_k, self.temperature)
            return {**rows, "bytes": tokens * bytes_per_token(self.top_k), "seconds": seconds}
        cost = {**rows, "seconds": 0.0}
        if self.teacher != START:
            return {**cost, "bytes": bytes_of_other(self.teacher, self.teacher_dtype)}
        free = adapter_is_zero(run.model, run.weights)
        return {**cost, "bytes": 0.0 if free else bytes_of_copies(run.weights, self.teacher_dtype)}

    def prepare(self, run: Run) -> None:
        """Make the teacher and prove that it is one; with `cache`, ask it everything now and let it go."""
        from ..answers import Answers
        from ..asking import key_of_answers
        from ..model import cache as cache_folder

        self._bind(run)
        if self.off:
            return
        teacher = self._other(run) if self.teacher != START else self._starting(run)
        if not self.cache:
            self._listen_to(teacher, run)
            return
        self.vocabulary, self.key = teacher.vocabulary, key_of_answers(teacher, run, self.top_k, self.temperature)
        self.answers = Answers(cache_folder() / "teacher" / self.key)
        self._ask_all(teacher, run)
        logger.info("distill: %s, answers kept in %s", self._where(), self.answers.folder)

    def token_loss(self, run: Run, batch: Batch) -> Tensor:
        """strength * T^2 * KL: summed over learn tokens; its mean over protect tokens, times the learn tokens."""
        if self.off:
            return batch.hidden.new_zeros(())
        parts = [self._on_learn(batch)] if self.learning else []
        parts += [self._on_protect(run, batch)] if self.protecting else []
        # of shards, every rank takes part in every pass, if only with nothing
        parts = [part for part in parts if part is not None and (len(part.hidden) or self._sharded)]
        self._seen += 1
        if not parts:
            self._note(ADDED, 0.0, len(batch.labels))
            return batch.hidden.sum() * 0.0
        total, kl = self._compare(run, batch, parts)
        self._note(ADDED, total.detach(), len(batch.labels))
        for part, found in zip(parts, kl.split([len(part.hidden) for part in parts]), strict=True):
            if not part.idle:
                self._note(part.where, found.sum(), len(found))
        return total

    def _note(self, where: str, value: float | Tensor, tokens: int) -> None:
        """Sum up for the logging window."""
        sums, count = self._window.get(where, (0.0, 0))
        self._window[where] = sums + value, count + tokens

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen copy, which nothing can make again once weights have moved; with `cache`, which answers count."""
        import torch

        if self.key is not None:
            key = torch.tensor(list(self.key.encode()), dtype=torch.uint8)
            return {"answers": key, "vocabulary": torch.tensor(self.vocabulary or 0)}
        return self.source.tensors() if self.source is not None else {}

    def load_state_dict(self, state: dict[str, Tensor], run: Run) -> None:
        """The teacher, or the answers, of the run that was stopped."""
        from ..answers import Answers
        from ..model import cache as cache_folder
        from ..teacher import AdapterOff, Frozen, given_back, only_lora

        self._bind(run)
        if self.off:
            return
        if "answers" in state:
            self.key, self.vocabulary = bytes(state["answers"].tolist()).decode(), int(state["vocabulary"]) or None
            self.answers = Answers(cache_folder() / "teacher" / self.key)
            self._ask_all(None, run)
        elif self.teacher != START:
            self._listen_to(self._other(run), run)
        elif state:
            copies = given_back(state, run.weights, self.teacher_device)
            self._listen_to(Frozen(run.model, run.weights, copies), run)
        elif only_lora(run.weights):
            self._listen_to(AdapterOff(run.model), run)
        else:
            raise IncompatibleError(
                "The checkpoint holds no copy of the starting weights for distill, and they have moved since. Resume "
                "with the settings it was written with, or start a new run."
            )

    def metrics(self) -> dict[str, float]:
        """kl_learn, kl_protect: KL(teacher || student), nats per token of all tasks; penalty: what was added to the
        loss, nats per learn token."""
        import torch

        from ..weights import ranks

        if not self._seen:
            return {}
        places = [*self.strengths, ADDED]
        sums = [torch.as_tensor(part).to(self.device) for place in places for part in self._window.get(place, (0.0, 0))]
        table = torch.stack([part.float() for part in sums]).view(-1, 2)  # of the kl, and of tokens
        if ranks()[1] > 1:
            torch.distributed.all_reduce(table)
        self._window, self._seen = {}, 0
        means = {place: kl / tokens for place, (kl, tokens) in zip(places, table.tolist(), strict=True) if tokens}
        penalty = means.pop(ADDED, 0.0)
        return {**{f"kl_{place}": kl for place, kl in means.items()}, "penalty": penalty}

    # ---- what it stands on -------------------------------------------------------------------------------------------

    def _usual_strength(self, lora: bool, protects: bool) -> float | None:
        """None where it acts on both, each with a strength of its own."""
        return USUAL.get(self._tokens(protects)) if self.strength is None else self.strength

    def _tokens(self, protects: bool) -> str:
        return self.on if self.on != "auto" else "protect" if protects else "learn"

    def _bind(self, run: Run) -> None:
        """Decide where to compare and how much it counts, and take the protect data apart."""
        from ..beside import Examples
        from ..weights import sharded

        on = self._tokens(bool(run.protect))
        self.strengths = {
            place: USUAL[place] if self.strength is None else self.strength
            for place in ("learn", "protect")
            if on in (place, "both")
        }
        self.learning, self.protecting = "learn" in self.strengths, "protect" in self.strengths
        self.off, self.device = self.strength == 0, run.device
        self.source, self.answers, self.key, self.vocabulary = None, None, None, None
        self._window, self._seen, self._at = {}, 0, (-1, 0)
        self._sharded = sharded(run.model.parameters())
        self.tasks = [Examples.of(name, batches) for name, batches in run.protect.items()] if self.protecting else []
        if self.off:
            return
        self._check(run)
        if self.protecting and not self._sharded:
            refuse_reentrant(run.model)

    def _check(self, run: Run) -> None:
        from ..weights import is_prompt_learning

        if self.on in ("protect", "both") and not run.protect:
            raise DataError(
                f"distill has no protect data and on is {self.on!r}. Type --protect FILE, or --protect self:256 to let "
                "the starting model write it, or --set distill.on=learn to compare at the learn tokens."
            )
        if is_prompt_learning(run.model):
            raise IncompatibleError(
                "distill compares what two models say at the same tokens, and this adapter puts virtual tokens before "
                "them (prompt tuning, prefix tuning, p-tuning). Use LoRA or full fine-tuning."
            )

    def _where(self) -> str:
        return " and ".join(f"strength {strength:g} on {place} tokens" for place, strength in self.strengths.items())

    def _starting(self, run: Run) -> Teacher:
        """The starting model, before any weight moved; with `cache` it is asked right now, and needs no copy."""
        from ..teacher import AdapterOff, Frozen, Teacher, adapter_is_zero, copied

        free = adapter_is_zero(run.model, run.weights)
        if (free or self.cache) and (self.teacher_dtype, self.teacher_device) != ("same", "same"):
            logger.warning("distill: there is no copy of the starting model here; its dtype and device do nothing")
        if free:
            return AdapterOff(run.model)
        if self.cache:
            return Teacher(run.model)
        return Frozen(run.model, run.weights, copied(run.weights, self.teacher_dtype, self.teacher_device))

    def _other(self, run: Run) -> Teacher:
        from ..teacher import load_other

        return load_other(self.teacher, run.model, run.tokenizer, run.device, self.teacher_dtype)

    def _listen_to(self, teacher: Teacher, run: Run) -> None:
        from ..teacher import prove

        with run.autocast():  # as it will be asked: some attention knows no fp32
            prove(teacher, run.weights)
        self.source, self.vocabulary = teacher, teacher.vocabulary
        kind = type(teacher).__name__
        logger.info("distill: %s, teacher %s (%s), %.1f MB", self._where(), self.teacher, kind, teacher.bytes() / 1e6)

    # ---- one micro-batch ---------------------------------------------------------------------------------------------

    def _on_learn(self, batch: Batch) -> Part:
        import torch

        weights = batch.hidden.new_full((len(batch.labels),), self.strengths["learn"], dtype=torch.float32)
        return Part("learn", batch.inputs, batch.hidden, weights)

    def _on_protect(self, run: Run, batch: Batch) -> Part | None:
        """The student's own pass over the protect rows that stand beside this micro-batch."""
        import torch

        from ..beside import beside, collated, one_seed, tokens_of_rows
        from ..examples import sent
        from ..generate import private_rng
        from ..logits import hidden_states

        learnt = tokens_of_rows(batch.inputs)
        place, device = self._place(run, len(learnt)), learnt.device
        drawn = beside(run.seed, run.step, range(place, place + len(learnt)), self.share, self.tasks)
        idle = self._sharded and not drawn  # shards are gathered by all ranks or by none
        drawn = [(0, self.tasks[0].examples[0], self.tasks[0].tokens)] if idle else drawn
        if not drawn:
            return None
        inputs = collated([example for _, example, _ in drawn], device)
        with private_rng(device, one_seed(run.seed, run.step, place)):  # dropout of its own
            hidden = states_through_output(run.model, inputs) if self._sharded else hidden_states(run.model, inputs)[0]
        rows = sent(torch.tensor([row for row, _, _ in drawn]), device)
        tokens = sent(torch.tensor([tokens for _, _, tokens in drawn]), device)
        each = learnt[rows] / tokens * (0.0 if idle else self.strengths["protect"] / self.share)
        weights = each.repeat_interleave(tokens_of_rows(inputs), output_size=len(hidden))
        return Part("protect", inputs, hidden, weights, idle, [example for _, example, _ in drawn])

    def _place(self, run: Run, rows: int) -> int:
        """Place of this micro-batch's first row among all rows of the optimizer step, over ranks with as many rows."""
        from ..weights import ranks

        rank, world = ranks()
        step, start = self._at
        start = start if step == run.step else 0
        self._at = run.step, start + world * rows
        return start + rank * rows

    def _compare(self, run: Run, batch: Batch, parts: list[Part]) -> tuple[Tensor, Tensor]:
        """Weighted sum with graph, and the KL of each token; in one pass, so that one gradient of the head is held."""
        import torch

        from ..divergence import bucketed_kl, forward_kl
        from ..teacher import first_tokens

        head = first_tokens(batch.logits, self.vocabulary)
        hidden, weights = torch.cat([part.hidden for part in parts]), torch.cat([part.weights for part in parts])
        how = {"temperature": self.temperature, "weights": weights}
        if self.answers is not None:
            kept = zip(*(self.answers.to(part.read(), hidden.device) for part in parts), strict=True)
            kept = [torch.cat(column) for column in kept]
            with run.autocast():  # as the task loss is computed, and as the teacher was asked
                return bucketed_kl(hidden, head, *kept, **how)
        with run.autocast():
            said = [self.source(part.inputs) for part in parts]
            states = torch.cat([states for states, _ in said]).to(hidden.device)
            return forward_kl(hidden, head, states, said[-1][1], **how)

    # ---- asking everything beforehand --------------------------------------------------------------------------------

    def _ask_all(self, teacher: Teacher | None, run: Run) -> None:
        """Have the answers to every protect and learn example there will be; learn rows are read a batch at a time.

        Raises:
            DataError: the learn rows cannot be seen beforehand.
        """
        from ..asking import ask_all

        learn = run.learn(sys.maxsize) if self.learning else []
        if self.learning and not learn:
            raise DataError(
                "distill.cache asks the teacher about the learn rows before training, but they are streamed or not "
                "tokenised. Set cache=false, or on=protect."
            )
        replayed = any(task.role == "protect" and task.drawn for task in run.tasks.values())
        protect = self._protect(run) if self.protecting or replayed else []
        ask_all(self.answers, teacher, [protect, learn], run, self.top_k, self.temperature)

    def _protect(self, run: Run) -> Batches:
        return [batch for task in run.protect.values() for batch in task]


@dataclass
class Part:
    """Tokens to compare at, from one forward pass of the student."""

    where: str
    inputs: dict[str, Any]
    hidden: Tensor
    weights: Tensor
    """What the KL of each token counts: [N]."""
    idle: bool = False
    """There because other ranks needed company; counts nothing."""
    examples: list[Example] | None = None
    """What it is made of, where that is known without asking the device."""

    def read(self) -> list[Example]:
        """Its examples; those of learn rows are taken apart anew."""
        from ..answers import examples_in

        return examples_in(self.inputs) if self.examples is None else self.examples


def states_through_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """`hidden_states`, tied to the model's output by a zero: FSDP2 gathers weights for backward when a gradient enters
    there, and would leave this pass, whose output nobody reads, without them.
    """
    from ..logits import hidden_states

    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    try:
        hidden, _ = hidden_states(model, inputs)
    finally:
        hook.remove()
    return hidden + 0.0 * outputs[0].sum()


def refuse_reentrant(model: nn.Module) -> None:
    """Raise where DDP would see the gradient of a checkpointed layer twice in a backward pass."""
    from ..weights import ranks

    funcs = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    reentrant = any(getattr(func, "keywords", {}).get("use_reentrant") for func in funcs)
    if reentrant and ranks()[1] > 1:
        raise IncompatibleError(
            "distill runs the model on learn and protect rows in one backward pass; with reentrant gradient "
            "checkpointing DDP takes the second gradient of a layer for an error. Type --gradient_checkpointing_kwargs "
            "'{\"use_reentrant\": false}', or --set distill.on=learn."
        )


@hookimpl
def ftplus_strategies() -> list[type[Strategy]]:
    """The strategies of this module."""
    return [Distill]
