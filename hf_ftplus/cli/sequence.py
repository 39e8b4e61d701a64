"""`ftplus sequence`: runs that follow one another, from one YAML file, and what each did to the tasks of all."""

from __future__ import annotations

import click

from ..config import read_yaml
from ..errors import UsageError
from .sft import take_environment


@click.command()
@click.argument("file", metavar="YAML", required=False)
@click.option("--config", metavar="YAML", help="The same file, as other commands take it.")
@click.option("--dry-run", is_flag=True, help="Check every stage and show the plan; train nothing.")
def sequence(file: str | None, config: str | None, dry_run: bool) -> None:
    """Train stage after stage and measure every task after each. Typed again, it goes on where it stopped.

    \b
    model_name_or_path: demo        # any key of `ftplus sft --config`, for all stages
    output_dir: out
    plugins: [ewc, replay]
    keep: 64                        # rows kept of every finished task, for later stages to protect
    stages:
      - name: reviews               # ... and any of them again in a stage
        dataset_name: reviews.jsonl
        measure: {reviews: reviews_held_out.jsonl}
      - name: facts
        dataset_name: facts.jsonl
        max_steps: 60
    """
    if bool(file) == bool(config):
        found = f"There are two files, {file} and {config}." if file else "There is no file."
        raise UsageError(f"{found} Expected one, with its stages: ftplus sequence run.yaml")
    given = read_yaml(file or config, "ftplus sequence")
    take_environment(given)  # before the libraries that read it are imported
    from ..stages import sequence as run

    run(given, dry_run=dry_run)
