"""What can go wrong between a name and a model."""


class ZooError(Exception):
    """The base of the zoo's errors; the command line prints them without a traceback."""


class UnknownModelError(ZooError, LookupError):
    """A name, tag, family or task that the zoo does not know; the message suggests one that it does."""


class CardError(ZooError, ValueError):
    """A card that is missing, unreadable or not valid; the message names the file and the key."""


class CheckpointError(ZooError, RuntimeError):
    """Weights that are missing, truncated, corrupt, or of another architecture; the message says what to do."""


class CardWarning(UserWarning):
    """A file among the checkpoints that is passed over, since it is not a valid card."""
