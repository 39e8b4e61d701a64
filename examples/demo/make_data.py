"""Write every file of the demo: `python examples/demo/make_data.py OUT_DIR`.

All text is composed here from fragments, or read from the running Python's standard library; the same on every call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from chat_questions import QUESTIONS
from facts import facts
from python_functions import python_functions
from reviews import reviews
from rows import Row
from summaries import summaries

FILES: dict[str, Callable[[], list[Row]]] = {
    "facts": lambda: facts(phrasing=0),
    "facts_other_phrasing": lambda: facts(phrasing=1),
    "python_protect": lambda: python_functions("protect", 64),
    "python_measure": lambda: python_functions("measure", 64),
    "chat_questions": lambda: [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS],
    "reviews": lambda: reviews("train", 1600),
    "reviews_measure": lambda: reviews("test", 200),
    "summaries": lambda: summaries("train", 480),
    "summaries_measure": lambda: summaries("test", 96),
}


def make_data(folder: Path) -> dict[str, int]:
    """Write NAME.jsonl for every entry of FILES; returns the number of rows in each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in FILES.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[name] = len(lines)
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Expected one folder. Type: python examples/demo/make_data.py OUT_DIR")
    for name, count in make_data(Path(sys.argv[1])).items():
        print(f"{count:5} rows  {Path(sys.argv[1]) / name}.jsonl")
