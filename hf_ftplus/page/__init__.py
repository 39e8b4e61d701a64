"""What runs found as one HTML page that opens from disk, with Markdown and CSV beside it.

found.py -> tables.py, answers.py, plots.py -> page.html.jinja -> write.py
"""

from .found import Found, Run, find
from .write import leave_card, leave_page, warned, write

__all__ = ["Found", "Run", "find", "leave_card", "leave_page", "warned", "write"]
