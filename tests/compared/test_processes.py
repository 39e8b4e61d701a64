"""Claims about the processes of cells, without training anything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from held import held

from hf_ftplus.compared.candidates import Row
from hf_ftplus.compared.cells import Cell, created, look, running
from hf_ftplus.compared.processes import Runner, last_words, watch
from hf_ftplus.errors import StorageError
from hf_ftplus.stages.plan import Stage


def cell(folder, name, **digests):
    made = Cell(Row(name, 1e-3), 42, Stage(1, name, folder / name, {}))
    (made.stage.folder / "ftplus").mkdir(parents=True)
    (made.stage.folder / "ftplus" / "data.json").write_text(json.dumps(digests))
    return made


def test_data_that_changed_between_two_cells_is_refused_by_name(tmp_path):
    runner = Runner()
    runner.know(cell(tmp_path, "one", rows="a", chat="b"))
    runner.know(cell(tmp_path, "two", rows="a", chat="b", **{"idea.py": "i"}))
    runner.know(cell(tmp_path, "plain", rows="a", chat="b"))
    with pytest.raises(StorageError, match=r"^idea\.py changed since other cells"):
        runner.know(cell(tmp_path, "stronger", rows="a", chat="b", **{"idea.py": "j"}))
    with pytest.raises(StorageError, match=r"^chat changed since other cells"):
        runner.know(cell(tmp_path, "three", rows="a", chat="c"))


def test_memory_is_that_of_a_process_and_its_children():
    eat = "import time; x = b'x' * 200_000_000; time.sleep(1)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {eat!r}])"
    assert watch(subprocess.Popen([sys.executable, "-c", child])) > 200_000_000


def test_a_process_is_known_by_its_number_and_its_start(tmp_path):
    it = cell(tmp_path, "one")
    assert running(it) is None
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        began = created(process.pid)
        it.keep(pid=process.pid, created=began)
        assert running(it) == process.pid
        it.keep(pid=process.pid, created=began - 5)  # another process has its number now
        assert running(it) is None
    finally:
        process.kill()
        process.wait()


def test_once_ended_nothing_starts_any_more(tmp_path, monkeypatch):
    """Ctrl-C may come while a cell is being placed."""
    runner, it = Runner(), cell(tmp_path, "one")
    monkeypatch.setattr(Runner, "_place", lambda self, cell: self.end())
    runner.run(it)
    assert not runner.processes
    assert it.kept == {}
    assert it.state == "waiting"


def test_a_kill_reaches_the_ranks_too(tmp_path):
    nap = "import time; time.sleep(60)"
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {nap!r}], start_new_session=True)"
    process, runner = subprocess.Popen([sys.executable, "-c", launch]), Runner()
    runner.processes.add(process)
    until = time.monotonic() + 30
    while not (ranks := psutil.Process(process.pid).children()) and time.monotonic() < until:
        time.sleep(0.05)
    runner.end(signal.SIGKILL)
    runner.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    assert len(gone) == 1
    assert not alive


def test_a_cell_that_another_process_writes_to_is_refused_whoever_started_it(tmp_path):
    it = cell(tmp_path, "one")
    (it.stage.folder / "model.safetensors").touch()
    it.stage.file.touch()
    it.stage.config = SimpleNamespace(model=SimpleNamespace(model_name_or_path="demo"))
    with held(it.stage.folder):
        for use in (lambda: look(it), lambda: Runner()._place(it)):
            with pytest.raises(StorageError, match=r"in use by another run \(pid 1 on elsewhere\).*another --out"):
                use()
    assert (it.stage.folder / "model.safetensors").is_file()


def test_the_end_reaches_all_that_run():
    runner = Runner()
    for _ in range(2):
        runner.processes.add(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
    begin = time.monotonic()
    runner.end(signal.SIGTERM)
    runner.wait()
    assert time.monotonic() - begin < 20
    assert [process.returncode for process in runner.processes] == [-signal.SIGTERM] * 2


def test_the_last_words_of_a_cell_are_its_error_or_its_end(tmp_path):
    log = tmp_path / "log.txt"
    assert last_words(log, -9) == f"no word of it (killed by signal 9; see {log})"
    log.write_bytes(b"\xff\nftplus: error: Old.\nftplus: error: No such file.\nnoise\n")
    assert last_words(log, 3) == f"No such file. (ended with 3; see {log})"
