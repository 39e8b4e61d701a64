"""Show a run as one table and its answers side by side, and keep it as strict JSON."""

from .record import Report, history
from .table import completions_view, joined_completions, joined_table, table

__all__ = ["Report", "completions_view", "history", "joined_completions", "joined_table", "table"]
