"""The two exceptions that end a command without a traceback."""

import contextlib
import os
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input, reported in one sentence that names the key, file or flag and says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


class Interrupted(BaseException):
    """The program was stopped by a preemption, a lost process or unavailable storage.

    The same command resumes. The command line prints the message and exits with `STATUS`, EX_TEMPFAIL in
    sysexits.h: a temporary failure. Like KeyboardInterrupt it isn't an Exception, because a signal can
    raise it anywhere, and no handler should mistake it for an error of the code that it interrupts.
    """

    STATUS = getattr(os, "EX_TEMPFAIL", 75)


@contextlib.contextmanager
def needing(package: str, *, extra: str, by: str) -> Iterator[None]:
    """Import a package of an extra in this block. If it isn't installed, raises UserError.

    by: what needs the package, the subject of the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(
            f"{by} needs the package {package}: pip install {package} (the extra `{extra}`)"
        ) from None
