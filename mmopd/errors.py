"""The one exception that a person is meant to read."""


class UserError(Exception):
    """What a user gave cannot work: one message that names the thing and the way out.

    The command line prints the message alone and exits with status 2; anything else is a traceback, since it is our
    mistake.
    """
