"""Watch a small model learn three things in a row and forget them, and the same with EWC and replay.

    python examples/sequence/run.py             plain, then `ftplus sequence examples/sequence/sequence.yaml`
    python examples/sequence/run.py --each      SI, EWC and replay alone as well

All are ordinary sequences: what is finished is not run again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import torch
import yaml
from rich.console import Console

HERE = Path(__file__).parent
os.chdir(HERE.parents[1])  # sequence.yaml names its files from the top of the repository
sys.path.insert(0, str(HERE.parent / "demo"))
OUT = Path("demo_output")
LAYERS = (0, 1, 2, 3, 28, 29)
"""Of the demo model's thirty. What goes missing with the others the first stage teaches anew."""


@click.command()
@click.option("--each", is_flag=True, help="SI, EWC and replay alone, too.")
def main(each: bool) -> None:
    """Make data and model, run the sequences (or what is left of them), show their matrices."""
    from make_data import make_data
    from run import ENVIRONMENT  # of the demo: how memory is kept, which glibc reads when a process starts

    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, str(HERE / "run.py"), *sys.argv[1:]], {**os.environ, **ENVIRONMENT})

    import hf_ftplus

    console = Console(highlight=False)
    make_data(OUT / "data")
    shrink(OUT / "sequence" / "model")
    given = yaml.safe_load((HERE / "sequence.yaml").read_text())
    arms = {"plain": {"plugins": [], "keep": 0}, "kept": {}}
    if each:
        ewc, replay = given["plugins"]
        arms |= {
            "si": {"plugins": [{"si": {"strength": 1}}], "keep": 0},
            "ewc": {"plugins": [ewc]},
            "replay": {"plugins": [replay]},
        }
    matrices = {
        name: hf_ftplus.sequence({**given, "output_dir": str(OUT / "sequence" / name), **arm})
        for name, arm in arms.items()
    }
    for name, matrix in matrices.items():
        console.print(f"\n[bold]{name}[/]", matrix.table())


def shrink(folder: Path) -> None:
    """The demo model with six of its thirty layers, unless it is there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_ftplus.model import demo

    if (folder / "config.json").is_file():
        return
    model = AutoModelForCausalLM.from_pretrained(demo())
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in LAYERS)
    model.config.num_hidden_layers = len(LAYERS)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo()).save_pretrained(folder)


if __name__ == "__main__":
    main()
