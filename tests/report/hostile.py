"""Text that would act if a page, a table or a spreadsheet took it for more than text, at every place that takes text."""

from __future__ import annotations

from pathlib import Path

from report.test_record import result

from hf_ftplus.evaluation import Completion
from hf_ftplus.evaluation.statistics import Estimate
from hf_ftplus.page import Found, Run
from hf_ftplus.page.read import Call, Candidate, Comparison, Flip, Scores
from hf_ftplus.report import Report
from hf_ftplus.report.matrix import Matrix

PAYLOADS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "' autofocus onfocus='document.title=1",
    "</style><style>body{display:none}</style>",
    "</title></textarea></pre></details><script>document.title='owned'</script>",
    "javascript:document.title='owned'",
    "<a href=javascript:document.title='owned'>x</a> [x](javascript:alert) ![x](https://bad.invalid/p.png) <https://bad.invalid>",
    "<iframe srcdoc='<b>'></iframe><meta http-equiv=refresh content='0;url=https://bad.invalid'><base href=https://bad.invalid>",
    "<!-- <![CDATA[ ]]> -->&lt;b&gt;&amp;",
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}${7*7}#{7*7}",
    "=cmd|'/C calc'!A0",
    "+1+1 -1 @SUM(A1) \t=1 \r=1",
    "-2+3",
    "- item www.bad.invalid",
    "1. item",
    "2) item",
    "--- ---",
    "===",
    "\t=HYPERLINK(1)",
    "a;=HYPERLINK(B1);b",
    "＝1+1",
    "a | b\n| --- | --- |\n| c | d |\n\n# heading\n```\ncode",
    "left\u202eright\u2066\u200b\u200d\ufeffinvisible",
    "\x1b[31mred\x1b]0;title\x07\x00\x9b2J\x7f",
    "\ud800 half",
    r"$\frac{1}{0}$ \\ `tick` *bold* _it_ ~~no~~",
]
"""Each once at every place."""


def full(text: str, name: str | None = None) -> Found:
    """Two runs, a sequence, an evaluation and a comparison of which every text is `text`."""
    name = name or text
    task = {"notes": [text], "metric": text, "completions": [Completion(text, text, f"{text} {text}", f"other {text}")]}
    facts = {
        "command": ["ftplus", text],
        "config": {text: [text, {text: text}]},
        "stopped": text,
        "seconds": {text: 1.0},
        "strategies": {text: {"bytes": 10, f"rows/{text}": 0.25, f"tokens/{text}": 0.5, text: text}},
        "history": [{"step": step, f"{text}/penalty": 0.1, "loss": 1.0} for step in (1, 2)],
    }
    report = Report(
        [result(name, "learn", **task), result(f"{name} 2", **task), result(f"{name} 3", text, **task)], facts
    )
    matrix = Matrix(
        [name], [f"{name} 2"], [[0.5], [None]], [[1.0], [2.0]], [[0.1], [0.2]], [[1.0], [None]], notes=[text]
    )
    runs = [Run(name, report, Path("report.json")), Run(f"{name} 2", report, Path("other.json"))]
    tasks = report.tasks[:1]
    said = Completion(text, text, f"{text} {text}", f"other {text}")
    calls = [Call(text, task, "lost", [Flip(3, said)], [Flip(4, said)], text) for task in tasks]
    scores = Scores([text, text], 0.05, {tasks[0].name: 0.01}, [calls], [])
    half = Estimate(0.5, 0.4, 0.6)
    rows = [Candidate(text, 3, half, half, half, 1.0, 60.0, 2.0, 3.0, 4.0, True)]
    comparison = Comparison(rows, text, text, text, text, [text])
    return Found(runs, {name: matrix}, [], {name: scores}, {name: comparison})
