"""Why a request is not answered, as OpenAI's clients read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class RefusedError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        message: one line that names the value and what was expected.
        param: the field to blame.
        code: a word for programs.
        headers: that the answer has besides.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_field(name: str, message: str, code: str | None = None) -> RefusedError:
    """A field whose value cannot be served."""
    return RefusedError(400, message, name, code)
