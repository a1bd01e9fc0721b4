"""The exception for a mistake of the user's; the command line prints it without a traceback."""


class UserError(Exception):
    """A mistake of the user's, said in one sentence: what was expected, what came, what to do."""
