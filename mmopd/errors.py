"""Errors that a person is meant to read, by kind. Each kind has an exit status, by which a script tells them apart."""

from typing import ClassVar


class UserError(Exception):
    """Something that a user gave cannot work: one message that names it and the way out.

    The command line prints the message alone and exits with `exit_status`; any other exception is a mistake of this
    package, and ends in a traceback and status 1. A kind says where to look; this class is for what has no kind.
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


KINDS = {kind.exit_status: kind for kind in (UserError, ConfigError, DataError, ServerError, CheckpointError)}


def kind_of(status: int | None) -> type[UserError]:
    """Return the kind of error with which a process ended; `UserError` for a status that is no kind's."""
    return KINDS.get(status or 0, UserError)
