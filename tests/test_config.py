"""One run as an object: values without loss, secrets nowhere."""

from __future__ import annotations

import pytest
from training import arguments
from trl import ModelConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from hf_ftplus.chosen import strategies
from hf_ftplus.config import DEFAULTS, RunConfig, build, merge
from hf_ftplus.errors import UsageError
from hf_ftplus.facts import masked
from hf_ftplus.report import Report


@pytest.mark.parametrize("value", [3.7, True, "many", float("nan"), float("inf"), [3]])
def test_a_value_that_would_be_changed_is_refused(value):
    with pytest.raises(UsageError, match=r"measure_rows: .* in YAML; expected a whole number"):
        merge({}, {"measure_rows": value})


@pytest.mark.parametrize("value", [3, 3.0, "3"])
def test_a_value_that_means_the_same_is_taken(value):
    assert merge({}, {"measure_rows": value})[0]["measure_rows"] == 3


def test_a_setting_that_is_typed_leaves_the_others_of_the_file():
    yaml = {"plugins": ["ewc"], "set": ["ewc.strength=3", "ewc.rows=5"], "metric": ["a=f1", "b=f1"]}
    ours, _ = merge({"set": ("ewc.rows=8",), "metric": ("b=rouge",)}, {**yaml, "measure": ["a=x.csv", "b=y.csv"]})
    config = build(ours)
    assert (config.strategies[0].strength, config.strategies[0].rows) == (3.0, 8)
    assert config.metrics == {"a": "f1", "b": "rouge"}


def test_what_is_not_said_is_as_declared():
    config = build(merge({}, {})[0])
    assert (config.measure_rows, config.completions) == (RunConfig.measure_rows, RunConfig.completions)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.fault("F8")
def test_the_report_holds_the_whole_configuration_less_its_secrets(tmp_path):
    training = arguments(tmp_path, hub_token="hf_secret", eos_token="<|im_end|>")
    training.model_init_kwargs = {"token": "hf_secret", "revision": "main", "of": [{"token": "hf_secret", "n": 1}]}
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path="trl-lib/tldr")])
    config = RunConfig(training=training, model=ModelConfig(), script=ScriptArguments(), mixture=mixture)
    path = Report([], {"config": config.resolved()}).save(tmp_path / "report.json")
    assert "hf_secret" not in path.read_text()
    found = Report.load(path).facts["config"]
    assert found["training"]["eos_token"] == "<|im_end|>"
    assert found["training"]["include_num_input_tokens_seen"] == "no"
    assert found["training"]["model_init_kwargs"] == {"revision": "main", "of": [{"n": 1}]}
    assert found["mixture"]["datasets"][0]["path"] == "trl-lib/tldr"


@pytest.mark.fault("F8")
def test_a_command_is_kept_without_its_secrets():
    assert masked(["--hub_token", "hf_x", "--a", "b"]) == ["--hub_token", "***", "--a", "b"]
    assert masked(["--out", "out/hf_checkpoints/x"]) == ["--out", "out/hf_checkpoints/x"]
    assert masked(["env.HF=hf_" + 34 * "a"]) == ["env.HF=***"]
    assert masked(["--hub_token=hf_x", "--eos_token", "</s>"]) == ["--hub_token=***", "--eos_token", "</s>"]


def test_tasks_that_a_flag_replaces_take_their_metrics_along():
    """What is measured instead has other names; a metric for a task that nobody ever named stays an error."""
    given = {"measure": {"learn": "a", "other": "b"}, "metric": {"learn": "exact_match", "other": "exact_match"}}
    ours, _ = merge({"measure": ("learn=c",), "metric": ("learn=choice",)}, given)
    assert ours["measure"] == ["learn=c"]
    assert ours["metric"] == ["learn=exact_match", "learn=choice"]
    assert build(ours).metrics == {"learn": "choice"}
    assert build(merge({"measure": ("learn=c",)}, {"measure": "b"})[0]).metrics == {}
    plain = {"measure": {"learn": "a"}, "metric": {"learn": "exact_match"}}
    assert merge({"measure": ("old=b",)}, plain)[0]["metric"] == ["learn=exact_match"]  # always measured
    named = {"measure": {"facts": "facts.jsonl"}, "metric": {"facts": "exact_match"}}
    assert merge({"measure": ("facts.jsonl",)}, named)[0]["metric"] == ["facts=exact_match"]
    assert merge({"measure": ("b.jsonl",)}, {"measure": "facts.jsonl", "metric": "facts=f1"})[0]["metric"] == []
    both = {"protect": {"a": "p"}, "measure": {"a": "m"}, "metric": {"a": "choice"}}
    assert merge({"measure": ("b=x",)}, both)[0]["metric"] == ["a=choice"]
    assert merge({"measure": ("a=x",)}, both)[0]["metric"] == ["a=choice"]  # measured on rows of its own
    with pytest.raises(UsageError, match="no task 'othr'"):
        build(merge({"measure": ("learn=c",)}, {**given, "metric": {"othr": "exact_match"}})[0])
    with pytest.raises(UsageError, match="no task 'other'"):
        build(merge({"measure": ("learn=c",), "metric": ("other=choice",)}, given)[0])


def test_settings_of_a_file_in_yaml_stay_where_others_are_typed(tmp_path):
    file = tmp_path / "idea.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom hf_ftplus import Strategy, setting\n\n\n"
        '@dataclass\nclass Two(Strategy):\n    """Two numbers."""\n\n    name: ClassVar[str] = "two"\n'
        '    one: float = setting(0.5, "a number", unit="of one")\n    more: float = setting(0.5, "a number", unit="of one")\n'
    )
    given = {"plugin": [str(file)], "settings": {str(file): {"one": 2.0}}, "set": ["two.more=3"]}
    (found,) = strategies(given)
    assert (found.one, found.more) == (2.0, 3.0)
