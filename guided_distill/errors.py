"""The two exceptions that end a command in good order."""

import os


class UserError(ValueError):
    """Bad input, reported in one sentence that names the key, file or flag and says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """


class Interrupted(BaseException):
    """Stopped by a pre-emption, a lost process or storage that is away; nothing is wrong here.

    The same command resumes it. The command line prints the message and exits with `STATUS`, which is
    EX_TEMPFAIL of sysexits.h: a failure that passes, so try again. Like KeyboardInterrupt it is no
    Exception: a signal can raise it anywhere, and nobody may take it for an error of what was going on.
    """

    STATUS = getattr(os, "EX_TEMPFAIL", 75)
