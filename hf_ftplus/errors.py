"""What can go wrong, each with the exit code that a script can act on.

A message says what was found, what was expected, and what to type. The command line prints it without a
traceback; `--debug` shows the traceback.
"""


class FTPlusError(Exception):
    """Base of every error that a user can cause or cure."""

    exit_code = 1


class UsageError(FTPlusError):
    """A flag, key, name or value that does not exist or is out of range."""

    exit_code = 2


class MissingPluginError(UsageError):
    """No installed distribution offers the strategy `name`."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class DataError(FTPlusError):
    """Data that is missing, empty, malformed, or leaves nothing to learn from or to protect."""

    exit_code = 3


class IncompatibleError(FTPlusError):
    """Parts that do not fit together: a strategy and a launcher, a state and a model, an adapter and a penalty."""

    exit_code = 4


class RetentionError(FTPlusError):
    """The retention gate (`--fail-if-retention-below`) did not pass. The model was saved all the same."""

    exit_code = 5


class StorageError(FTPlusError):
    """A directory or file that cannot be written, or that belongs to another run."""

    exit_code = 6


class PluginError(FTPlusError):
    """A strategy raised inside a hook, or a plugin broke its contract."""

    exit_code = 7


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """` Did you mean 'ewc'?` for the known word closest to a misspelt one, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def escape(text: str, limit: int = 80) -> str:
    """`text` fit for a terminal: control and invisible characters spelt out, cut at `limit` characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + ("..." if len(text) > limit else "")


def reason(error: BaseException) -> str:
    """What an exception of another library says, on one line; its name if it says nothing."""
    error = cause(error)
    first, *more = str(error).strip().splitlines() or [""]
    goes_on = first.endswith(":") or len(first.split()) < 4  # "Couldn't cast", and then what
    return escape(" ".join([first, *map(str.strip, more[:2])]) if goes_on else first, 300) or type(error).__name__


def cause(error: BaseException) -> BaseException:
    """What went wrong where `datasets` says only that something did."""
    return error.__cause__ or error if type(error).__name__ == "DatasetGenerationError" else error
