"""tokenweight keeps the laws under each rule, and its loss is the weighted one, as the papers' own code has it."""

from __future__ import annotations

import math

import pytest
import torch
from ftplus_tokenweight import TokenWeight, eaft_weights, flow_weights, stm_weights

from hf_ftplus import plugins, testing
from hf_ftplus.errors import IncompatibleError
from hf_ftplus.testing import check_strategy, law_acts, law_remembers, law_silent_at_zero
from hf_ftplus.testing.tiny import tiny_llama
from hf_ftplus.testing.training import LEARN, first_gradient, trainer


def test_it_keeps_every_law():
    check_strategy(TokenWeight(rule="flow"))


@pytest.mark.parametrize("settings", [{}, {"rule": "stm", "threshold": 66.0}], ids=str)
def test_the_other_rules_keep_every_law_that_could_suffer(settings):
    laws = [law_silent_at_zero, law_remembers, law_acts]
    check_strategy(TokenWeight(**settings), laws=laws, peft=False, processes=False)


def test_it_remembers_and_is_silent_at_zero():
    laws = [testing.law_introduces_itself, testing.law_silent_at_zero, testing.law_remembers]
    check_strategy(TokenWeight(rule="flow"), laws=laws, peft=False, processes=False)


# ---- the formulas, slowly --------------------------------------------------------------------------------------------


def test_eaft_weighs_by_the_entropy_of_the_likeliest_tokens():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    for row, weight in zip(logits, eaft_weights(logits, 2.0), strict=True):
        top = sorted(row.exp().tolist())[-20:]
        probs = [value / sum(top) for value in top]
        entropy = -sum(p * math.log(p) for p in probs)
        assert weight.item() == pytest.approx((entropy / math.log(20)) ** 2, rel=1e-5)
    assert eaft_weights(torch.zeros(1, 50)).item() == pytest.approx(1)
    sure = torch.zeros(1, 50)
    sure[0, 3] = 100.0
    assert eaft_weights(sure).item() < 1e-30


def test_stm_drops_what_was_hard_and_flow_weighs_rows_by_their_median():
    assert stm_weights(torch.tensor([0.1, 0.9, 0.92, 5.0])).tolist() == [1, 1, 0, 0]  # ln 2.5 = 0.916
    assert flow_weights(torch.tensor([1.0, 2.0, 4.0])).tolist() == pytest.approx(
        [math.exp(-x) for x in (0.5, 1.0, 2.0)]
    )


def weighted(rows, weights_of):
    """Gradients of sum w l / N over all rows in one padded batch: plain autograd on the model's own logits."""
    model = tiny_llama().train()
    ids, labels, mask = rows["input_ids"], rows["labels"], rows["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    on = labels[:, 1:] != -100
    ((weights_of(logits, nll.detach(), on) * nll)[on].sum() / on.sum()).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def by_eaft(logits, nll, on):
    return eaft_weights(logits.detach().flatten(0, 1)).view_as(nll)


def by_stm(logits, nll, on):
    return (nll.exp() <= 400.0).float()


def by_flow(logits, nll, on):
    rows = torch.stack([row[keep].mean() for row, keep in zip(nll, on, strict=True)])
    return torch.exp(-rows / rows.sort().values[3:5].mean())[:, None].expand_as(nll)


@pytest.mark.parametrize(
    ("settings", "weights_of"),
    [({"rule": "eaft"}, by_eaft), ({"rule": "stm", "threshold": 400.0}, by_stm), ({"rule": "flow"}, by_flow)],
    ids=["eaft", "stm", "flow"],
)
@pytest.mark.parametrize("kind", ["padded", "padding-free"])
def test_the_gradient_of_a_step_is_that_of_the_weighted_loss(tmp_path, settings, weights_of, kind):
    free = {"padding_free": True, "max_length": None} if kind == "padding-free" else {}
    found, _ = first_gradient(
        tmp_path, TokenWeight(**settings), per_device_train_batch_size=4, gradient_accumulation_steps=2, **free
    )
    padded = trainer(tmp_path, learn=LEARN[:8], per_device_train_batch_size=8)
    rows = next(iter(padded.get_train_dataloader()))
    wanted = weighted(rows, weights_of)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_logits_are_made_in_the_precision_of_training(tmp_path, monkeypatch):
    rounded = []

    def noting(logits, power):
        rounded.append(torch.equal(logits, logits.bfloat16().float()))
        return eaft_weights(logits, power)

    monkeypatch.setattr("ftplus_tokenweight.eaft_weights", noting)
    trainer(tmp_path, TokenWeight(rule="eaft"), bf16=True, max_steps=1).train()
    assert rounded
    assert all(rounded)


def test_a_replayed_row_that_was_not_asked_about_counts_in_full(tmp_path):
    it = trainer(tmp_path, TokenWeight(rule="flow"), ("replay", {"share": 0.5}), max_steps=4, logging_steps=4)
    it.train()
    mean = next(log["tokenweight/mean_weight"] for log in it.state.log_history if "tokenweight/mean_weight" in log)
    known = it.ftplus.strategies[0]._rows["weights"]
    assert known.max() < 0.6
    assert mean > 0.6


def test_eaft_leaves_replayed_rows_as_they_are(tmp_path):
    """What is replayed is what the model is sure of: weighed like learn rows, it would hardly be replayed at all."""
    how = {"max_steps": 4, "logging_steps": 4}
    it = trainer(tmp_path, TokenWeight(rule="eaft", power=1e5), ("replay", {"share": 0.5}), **how)
    it.train()
    mean = next(log["tokenweight/mean_weight"] for log in it.state.log_history if "tokenweight/mean_weight" in log)
    assert mean == pytest.approx(it.state.log_history[0]["replay/share_of_tokens"], abs=0.1)


def test_rows_that_cannot_be_read_beforehand_are_refused(tmp_path):
    it = trainer(tmp_path, TokenWeight(rule="stm"), max_steps=2)
    it.train_dataset = it.train_dataset.to_iterable_dataset()
    with pytest.raises(IncompatibleError, match=r"a stream, DPO.*--set tokenweight\.rule=eaft"):
        it.train()


def test_the_command_line_finds_it():
    assert plugins.load("tokenweight") is TokenWeight
