"""What runs found as one HTML page that opens from disk, with Markdown and CSV beside it.

read.py -> found.py -> tables.py, verdicts.py, answers.py, drawn.py (plots.py) -> page.html.jinja, flat.py -> write.py
"""

from .found import Found, find
from .read import Run
from .write import leave_card, leave_page, warned, write

__all__ = ["Found", "Run", "find", "leave_card", "leave_page", "warned", "write"]
