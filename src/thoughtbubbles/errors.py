"""How a command ends other than by finishing: each is one line on standard error and an exit code."""

# Of a value in a message, which has one line.
MOST_CHARACTERS = 200


class InputError(ValueError):
    """Bad input from a user: one line that names the value and what was expected."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on through no fault of its input: one line that says why and what is left."""

    exit_code = 1


class RunInterrupted(Exception):  # noqa: N818 (it is no error)
    """A signal came, and everything was saved: the next start goes on from here."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """What a library says of an error, in one line and without its advice."""
    text = str(error).partition("Example of usage")[0]
    return " ".join(text.split()) or type(error).__name__


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
