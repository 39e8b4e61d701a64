"""Several models on the same rows, each compared with the first: `ftplus eval`.

plan        what is asked: models, tasks, and how
content     models, tasks and code known by what they hold
cells       what one model did on one task, kept as soon as it is there
harness     tasks of lm-evaluation-harness
export      our tasks as such
measuring   one model in memory after the other
judged      figures, verdicts and flipped rows; eval.json and the rows behind it
shown       the table
"""
