"""Real text for four tasks and what must not be forgotten, read from packages of the registry that pip downloads.

    python examples/benchmarks/forgetting/real_data.py DIR

| file | what it asks | where it comes from |
|---|---|---|
| sentiment | is a sentence positive or negative? | ratings of films and products, in the sdist of vaderSentiment |
| code | write a Python function | `algorithms` |
| translation | say it in German | message catalogues of Django and Sphinx |
| arithmetic | add or subtract two numbers | made here |
| prose | (kept) text of newspaper editorials | the sdist of vaderSentiment |
| python, chat | (kept) as in the demo | the running Python; questions of the demo |

Each has rows to train on, or to protect with (`NAME.jsonl`), and others to measure (`NAME_measure.jsonl`): which are
which is told by a hash of what is asked, so that no text is in both. Nothing of it is shipped, and nothing of the
packages is installed or run; pip checks their sha256.
"""

from __future__ import annotations

import gettext
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))
from chat_questions import QUESTIONS
from python_functions import pairs, python_functions, to_write
from rows import Row, row

PACKAGES = {
    "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "algorithms==1.0.1": "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64",
    "django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
    "sphinx==8.2.3": "4405915165f13521d875a8c29c8970800a0141c14cc5416a38feca4ea5d9b9c3",
}
SENTENCES = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
"""An archive within the archive; only the sdist has it."""
CLEAR = 1.5
"""Of mean ratings from -4 to 4: people agree that the sentence praises, or blames."""
ROWS, MEASURED = 640, 64
"""At most, of each task."""
LONGEST = 140
"""Characters of a sentence."""


def make_data(folder: Path) -> dict[str, int]:
    """Write every file, unless all are there; returns the rows of each."""
    counts = folder / "rows.json"
    if counts.is_file():
        return json.loads(counts.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        packages = download(Path(place))
        made = {name: make(packages) for name, make in MAKERS.items()}
    files = {
        "chat_measure": [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS],
        "python": python_functions("protect", MEASURED),
        "python_measure": python_functions("measure", MEASURED),
    }
    for name, rows in made.items():
        apart = split(rows)
        files[name], files[f"{name}_measure"] = apart[False][:ROWS], apart[True][:MEASURED]
    for name, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {name: len(rows) for name, rows in files.items()}
    counts.write_text(json.dumps(found) + "\n")  # last: all others are there
    return found


def download(folder: Path) -> dict[str, Path]:
    """The archive of each package, as pip found it, by the package's name."""
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in PACKAGES.items()))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "vaderSentiment"]
    done = subprocess.run([*command, "-r", str(wanted), "-d", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip could not download {', '.join(PACKAGES)}:\n{done.stderr.strip()}")
    archives = {path.name.split("-")[0].lower(): path for path in folder.iterdir() if path != wanted}
    return {name.split("==")[0]: archives[name.split("==")[0].lower()] for name in PACKAGES}


def split(rows: list[Row]) -> dict[bool, list[Row]]:
    """Rows to train on (False) and to measure (True), a quarter of all, each in the order of their hashes."""
    asked = {hashlib.sha256(json.dumps(row.get("prompt", row)).encode()).digest(): row for row in rows}
    ordered = sorted(asked.items())
    return {side: [row for key, row in ordered if (key[-1] < 64) == side] for side in (False, True)}


# ---- what is learnt --------------------------------------------------------------------------------------------------


def sentiment(packages: dict[str, Path]) -> list[Row]:
    """As many of one kind as of the other."""
    kinds: dict[str, list[str]] = {"positive": [], "negative": []}
    for rating, text in rated(packages, "movieReviewSnippets", "amazonReviewSnippets"):
        if abs(rating) >= CLEAR and 20 <= len(text) <= LONGEST:
            kinds["positive" if rating > 0 else "negative"].append(text)
    count = min(map(len, kinds.values()))
    return [
        row(f"Is this sentence positive or negative?\n{text}", kind, choices=list(kinds))
        for kind, texts in kinds.items()
        for text in random.Random(kind).sample(texts, count)
    ]


def code(packages: dict[str, Path]) -> list[Row]:
    with zipfile.ZipFile(packages["algorithms"]) as wheel:
        modules = [wheel.read(name).decode() for name in sorted(wheel.namelist()) if name.endswith(".py")]
    return [to_write(*pair) for module in modules for pair in pairs(module)]


def translation(packages: dict[str, Path]) -> list[Row]:
    """Short messages without placeholders, markup or context, the first translation of each."""
    found: dict[str, str] = {}
    for english, german in messages(packages):
        plain = not re.search(r"[%{}<>\n`*|_\x04]", english + german)
        if plain and " " in english and len(english) <= LONGEST and english != german:
            found.setdefault(english, german)
    return [row(f"Translate into German: {english}", german) for english, german in found.items()]


def arithmetic(packages: dict[str, Path]) -> list[Row]:
    draw = random.Random(0)
    rows = []
    for _ in range(4 * ROWS):
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        rows.append(row(f"What is {a} + {b}?", str(a + b)) if a < b else row(f"What is {a} - {b}?", str(a - b)))
    return rows


def prose(packages: dict[str, Path]) -> list[Row]:
    return [{"text": text} for _, text in rated(packages, "nytEditorialSnippets") if 60 <= len(text) <= 2 * LONGEST]


MAKERS: dict[str, Callable[[dict[str, Path]], list[Row]]] = {
    "sentiment": sentiment,
    "code": code,
    "translation": translation,
    "arithmetic": arithmetic,
    "prose": prose,
}


# ---- archives --------------------------------------------------------------------------------------------------------


def rated(packages: dict[str, Path], *corpora: str) -> Iterator[tuple[float, str]]:
    """Mean rating and text of every sentence."""
    with tarfile.open(packages["vaderSentiment"]) as sdist, tarfile.open(fileobj=sdist.extractfile(SENTENCES)) as inner:
        for corpus in corpora:
            lines = inner.extractfile(f"hutto_ICWSM_2014/{corpus}_GroundTruth.txt").read().decode("utf-8", "replace")
            for line in lines.splitlines():
                _, rating, text = line.split("\t")
                yield float(rating), text.strip()


def messages(packages: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """English messages and their German translations."""
    for package in ("django", "sphinx"):
        with zipfile.ZipFile(packages[package]) as wheel:
            for name in sorted(wheel.namelist()):
                if re.search(r"/locale/de/LC_MESSAGES/\w+\.mo$", name):
                    catalogue = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog
                    yield from ((key, text) for key, text in catalogue.items() if isinstance(key, str) and key)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Expected one folder. Type: python examples/benchmarks/forgetting/real_data.py DIR")
    for name, count in make_data(Path(sys.argv[1])).items():
        print(f"{count:5} rows  {Path(sys.argv[1]) / name}.jsonl")
