"""Claims about what a comparison says it will take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_ftplus.cli.sft import configured
from hf_ftplus.compared.candidates import Row
from hf_ftplus.compared.cells import Cell
from hf_ftplus.compared.plan import (
    Forecast,
    Probe,
    duration,
    forecast,
    probed,
    refuse_long,
    seconds_of,
    spent,
    steps,
    total,
)
from hf_ftplus.config import RunConfig
from hf_ftplus.errors import FTPlusError, UsageError
from hf_ftplus.facts import most_held
from hf_ftplus.report import Report
from hf_ftplus.stages.plan import Stage


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("300s", 300), ("0.5h", 1800)]
)
def test_a_budget_has_a_unit(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["2", "", "h", "0h", "2 h", "-1h", "30m1h", "soon", "1e3s"])
def test_a_budget_without_one_is_refused(text):
    with pytest.raises(UsageError, match="expected a time with its unit"):
        seconds_of(text)


def done(folder, row, seed, seconds, peak=None, resumed=False, training=1.0):
    made = Cell(row, seed, Stage(1, "", folder / row.name / str(seed), {}), "finished")
    (made.stage.folder / "ftplus").mkdir(parents=True)
    made.keep(resumed=resumed, seconds=seconds, peak_bytes=peak, code=0)
    Report([], {"seconds": {"training": training}}).save(made.stage.report)
    return made


def test_a_cell_is_foretold_from_its_own_row_then_from_others_then_from_the_probe(tmp_path):
    one, two = Row("one", 1), Row("two", 1)
    waiting = [Cell(row, 9, Stage(1, "", tmp_path / "none", {})) for row in (one, two)]
    probe = Probe(done(tmp_path, Row("probe", 1), 1, 10.0, 500, training=3.0), steps=100)
    assert forecast(waiting[0], waiting, None) == Forecast()
    assert forecast(waiting[0], waiting, probe) == Forecast(7 + 100.0, 500, "the probe")
    assert total(waiting, probe, 1) == pytest.approx(214)
    assert total(waiting, probe, 2) == pytest.approx(107)
    cells = [
        *waiting,
        done(tmp_path, one, 1, 20.0, 100),
        done(tmp_path, one, 2, 30.0, 300),
        done(tmp_path, one, 3, 1.0, resumed=True),
    ]
    assert forecast(waiting[0], cells, probe) == Forecast(25, 300, "2 finished cells")
    assert forecast(waiting[1], cells, probe) == Forecast(25, 300, "2 cells of other rows")


def test_what_finished_cells_took_is_spent(tmp_path):
    row = Row("one", 1)
    waiting = Cell(row, 9, Stage(1, "", tmp_path / "none", {}))
    assert spent([waiting], 2) == 0
    cells = [waiting, done(tmp_path, row, 1, 20.0), done(tmp_path, row, 2, 30.0, resumed=True)]
    assert spent(cells, 1) == 50
    assert spent(cells, 2) == spent(cells, 8) == 25
    outlived = done(tmp_path, row, 3, 1.0, training=7.0)
    outlived.keep(pid=1, created=1.0, resumed=False)  # `compare` was killed, and the process went on to its end
    (outlived.stage.folder / "checkpoint-2").mkdir()
    outlived.finish()
    assert not (outlived.stage.folder / "checkpoint-2").exists()
    assert spent([outlived], 1) == 7
    failed = Cell(row, 4, Stage(1, "", tmp_path / "failed", {}), "failed")
    failed.keep(pid=1, created=1.0, resumed=True, spent=12.0, seconds=5.0, code=1)
    assert spent([failed, outlived], 1) == 19


def test_memory_is_that_of_the_device_where_there_is_one(tmp_path):
    made = done(tmp_path, Row("one", 1), 1, 10.0, peak=500)
    Report([], {"seconds": {}, "device_bytes": None}).save(made.stage.report)
    assert made.peak_bytes() == 500
    Report([], {"seconds": {}, "device_bytes": 300}).save(made.stage.report)
    assert made.peak_bytes() == 300
    assert most_held(torch.device("cpu")) is None


def test_what_is_not_known_is_no_zero(tmp_path):
    probe = Probe(done(tmp_path, Row("probe", 1), 1, 10.0), steps=None)
    waiting = [Cell(Row("one", 1), 1, Stage(1, "", tmp_path / "none", {}))]
    assert total(waiting, probe, 1) is None
    assert duration(None) == "n/m"
    with pytest.raises(UsageError, match=r"not known.* Type ftplus compare --yes"):
        refuse_long(None, "ftplus compare --yes")
    refuse_long(1800, "")
    with pytest.raises(UsageError, match=r"about 31 min; above 30 min .*Type ftplus compare --yes"):
        refuse_long(1860, "ftplus compare --yes")


def test_steps_are_those_of_the_config():
    assert steps(RunConfig(training=SimpleNamespace(max_steps=7)), 4) == 7


def test_steps_of_epochs_are_shared_by_processes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 50)
    config, _, _ = configured({}, [], {
        "model_name_or_path": "m", "dataset_name": str(rows), "num_train_epochs": 3, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "bf16": False, "output_dir": str(tmp_path / "out"),
    })  # fmt: skip
    assert steps(config, 1) == 7 * 3  # 50 rows are 13 batches, 7 steps an epoch
    assert steps(config, 4) == 2 * 3


def test_the_probe_runs_where_it_is_told(tmp_path):
    seen = []

    class Told:
        def run(self, cell, device=None):
            seen.append(device)
            cell.error = "no memory"

    first = Cell(Row("one", 1e-3), 1, Stage(1, "one", tmp_path / "one", {}))
    config = RunConfig(training=SimpleNamespace(max_steps=7))
    with pytest.raises(FTPlusError, match=r"No candidate can start\. The first one, one: no memory"):
        probed([first], tmp_path, {}, config, Told(), "3")
    assert seen == ["3"]
