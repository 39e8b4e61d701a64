"""Train one stage after another, measure every task after each, and go on where it stopped when it is asked again.

    matrix = hf_ftplus.sequence("run.yaml")        the same as `ftplus sequence run.yaml`

    OUT/01-reviews/                     an ordinary `ftplus sft` run: model, checkpoints, ftplus/report.json, memory
    OUT/01-reviews/ftplus/stage.yaml    what it was told; by hand: ftplus sft --config ... --output_dir ELSEWHERE
    OUT/01-reviews/ftplus/data.json     digests of the files of rows that it read
    OUT/01-reviews/merged/              where it trained an adapter: the model that the next stage starts from
    OUT/pools/reviews.jsonl             rows of it that later stages protect
    OUT/sequence.json, sequence.csv     the matrix so far

plan        the YAML as stages, every name and setting checked
handover    what a stage is given by those before it, and what it leaves
resuming    what is there already, and whether to go on from it
digests     which rows it read
reservoir   rows of a finished task, each with the same chance
shown       the plan in words, and what may be removed
runner      the story: sequence()
"""

from .runner import sequence

__all__ = ["sequence"]
