"""The errors a user can meet, in one tree, so that an edge catches exactly ours.

Every message names the thing, the value it had, what was expected and the way out.
"""


class ClipRayError(Exception):
    """An expected failure: the message is for the user, no traceback is needed."""


class ConfigError(ClipRayError):
    """A configuration value, key or combination that cannot be used."""


class DataError(ClipRayError):
    """Input data that is missing, damaged beyond the limit, or not what was indexed."""


class StorageError(ClipRayError, OSError):
    """A store that does not answer, after all its retries; it may later."""


class CheckpointError(ClipRayError):
    """A checkpoint or run directory that cannot be written, read or resumed."""


class RegistryError(ClipRayError):
    """A model that is not in the registry, or whose bytes are not the registered ones."""


class ClusterError(ClipRayError):
    """A Ray cluster that cannot be reached, or that cannot give what was asked of it."""


class TrainingError(ClipRayError):
    """A training that cannot go on: non-finite numbers, or failure after failure."""
