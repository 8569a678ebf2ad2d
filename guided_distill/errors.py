"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the key, file or flag and says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """
