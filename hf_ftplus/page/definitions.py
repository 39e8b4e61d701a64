"""What every figure of the page means: one click away from the figure."""

DEFINITIONS = {
    "interval": (
        "n and [low, high]",
        "n is how many rows a figure was measured on. [low, high] is its 95 % interval: how far these rows stand for "
        "others like them, by a paired bootstrap over rows, or by Wilson's or Bonett and Price's interval where rows "
        "can only be right or wrong. It says nothing about another seed of training. With few rows (16; 64 "
        "where tokens are counted), or where nearly all are right, it is too narrow.",
    ),
    "seeds": (
        "n and [low, high] over seeds",
        "n is how many seeds were trained. [low, high] is Student's 95 % interval over them: what another seed would "
        "have given, on the same rows. None with one seed, or where seeds agree.",
    ),
    "score": (
        "Score",
        "The task's own metric where it has one (exact match, choice, F1, ROUGE), else token accuracy; in percent. "
        "Token accuracy of a model that says nothing is not 0: it may know how a turn ends, or a word that is "
        "everywhere.",
    ),
    "metric": (
        "The task's own metric",
        "Share of rows that are right, or the mean of what each row scores, in percent. Exact match: the greedy answer "
        "is the expected one. Choice: the expected answer is the most likely of those offered. An empty answer is "
        "wrong.",
    ),
    "token_accuracy": (
        "Token accuracy",
        "Share of supervised tokens that the model finds most likely, given the right tokens before them; in percent.",
    ),
    "loss": ("Loss", "Mean negative log-likelihood of the supervised tokens, in nats per token. Lower is better."),
    "drift": (
        "Drift",
        "Mean forward KL divergence from the starting model to the trained one, over the whole vocabulary, in nats per "
        "token. 0: both say the same.",
    ),
    "retention": (
        "Retention",
        "Score after training / score before it, on the same rows. 1: all is kept. Undefined where the score was 0 "
        "before; n/m: not measured.",
    ),
    "change": ("Change", "End - start, paired row by row; its interval is that of the difference."),
    "flips": (
        "Flips",
        "Rows that were right before training and are wrong now (-), and the other way round (+). Equal scores can "
        "hide many of both.",
    ),
    "verdict": (
        "Verdict",
        "One word for the change of score against the first model, by a rule fixed before: lost or gained where the "
        "95 % interval leaves out 0 and the change is above the noise floor; kept where all of it lies within the "
        "margin; not resolved where there are too few rows to tell; not measured where a figure is missing.",
    ),
    "noise_floor": (
        "Noise floor",
        "How far the first model's score moves when it is scored again in other batches, by rounding alone; in points. "
        "No smaller change is called one.",
    ),
    "learning": (
        "Learnt",
        "Change of the score on the learn tasks, after - before, mean over tasks and seeds; in points.",
    ),
    "kept": (
        "Kept",
        "Score after / before on the protect tasks, mean over tasks and seeds; in percent.",
    ),
    "front": (
        "Pareto front",
        "Candidates that no other beats: none learns as much and keeps as much, and more of one of them.",
    ),
    "memory": (
        "Memory",
        "The most that tensors of one run held on its first GPU; without one, that its process held.",
    ),
    "speed": ("Tokens per second", "Scored with this model, by the wall clock of its machine: one pass, no interval."),
    "seconds": (
        "Seconds",
        "Wall-clock time of each stage of the run on its machine; of a resumed run, since then.",
    ),
    "bytes": ("State", "Memory that the strategies hold while training, besides model and optimizer."),
    "steps": ("Steps", "Updates of the weights."),
    "matrix": (
        "The matrix of a sequence",
        "Each row is the model after one stage, each column a task; above the score in percent, below the loss in nats "
        "per token. Framed: the task that the stage has just learnt.",
    ),
    "ACC": ("ACC", "Mean over tasks after the last stage."),
    "BWT": (
        "Backward transfer",
        "Mean change of each task from right after it was learnt to the end. For scores a negative figure is "
        "forgetting, for losses a positive one. Read it beside LA: who learns nothing forgets nothing.",
    ),
    "FWT": ("Forward transfer", "Mean change of each task from the start to just before its own stage."),
    "forgetting": ("Forgetting", "Mean of what was lost of each task since it stood best."),
    "LA": ("Learning accuracy", "Mean over tasks right after each was learnt."),
    "mixture": (
        "Realised mixture",
        "What each task took of the training stream: share of rows, and share of supervised tokens.",
    ),
    "steps_figure": (
        "Over steps",
        "What the trainer logged. Penalty: what a strategy adds to the loss, in nats per token. Predicted drift: what "
        "EWC's diagonal expects, far below the measured one. KL: divergence from the teacher on the rows seen, in nats "
        "per token. Retention and drift of a task: measured on its rows while training lasted, for --stop-when.",
    ),
}
