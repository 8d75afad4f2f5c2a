"""Errors for the user, by kind. Each kind has its own exit status, so that scripts can tell them apart."""

from typing import ClassVar


class UserError(Exception):
    """Something that a user gave cannot work: one message that names the problem and its fix.

    The command line prints only the message and exits with `exit_status`. Any other exception is a bug of this package,
    and ends in a traceback and status 1. The subclasses name the area of the problem; this class is for problems
    without an area.
    """

    exit_status: ClassVar[int] = 2


class ConfigError(UserError):
    """A setting or a file of the catalogue (recipe, fleet, mixture, suite, task) is missing, unknown or cannot work."""

    exit_status = 3


class DataError(UserError):
    """Prompts, images or shards are missing, damaged, or yield nothing to learn from."""

    exit_status = 4


class ServerError(UserError):
    """A server does not start, ends, does not answer, or gives answers that cannot be trusted."""

    exit_status = 5


class CheckpointError(UserError):
    """A checkpoint or a model folder cannot be read or written, or does not fit this run."""

    exit_status = 6


STOPPED = 75  # exit status of a run that has stopped as asked, to be continued (EX_TEMPFAIL of sysexits.h)
KINDS = {kind.exit_status: kind for kind in (UserError, ConfigError, DataError, ServerError, CheckpointError)}


def kind_of(status: int | None) -> type[UserError]:
    """Return the kind of error for the exit status of a process; `UserError` for a status of no kind."""
    return KINDS.get(status or 0, UserError)
