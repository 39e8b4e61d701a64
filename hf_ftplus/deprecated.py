"""Say for at least one minor version what will go, before the number of the plugin API is raised (`hookspecs.py`)."""

from __future__ import annotations

import warnings

from .hookspecs import API


def deprecated(what: str, instead: str, since: str) -> None:
    """Warn whoever called the function that calls this: `deprecated("Run.rate", "Run.learning_rate", since="0.2")`."""
    warnings.warn(
        f"{what} is deprecated since hf-ftplus {since}, and goes with plugin API {API + 1}. Use {instead}.",
        DeprecationWarning,
        stacklevel=3,
    )
