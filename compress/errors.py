"""Errors a user can act on. Each names the value, the rule it breaks and the remedy.

Exit codes of the command line: 0 success, 1 a bug (traceback), 2 a `CompressError` (bad input or an
environment that cannot do what was asked), 3 a quality gate that failed, 130 interrupted.
"""


class CompressError(Exception):
    """Base of every error the command line reports without a traceback."""

    exit_code = 2


class ConfigError(CompressError):
    """A recipe, key or value that cannot be run."""


class UnsupportedModel(CompressError):
    """A model this pipeline cannot take apart or quantize faithfully."""


class ModelFileError(CompressError):
    """Source weights that are missing, truncated, corrupt, pickled or not finite."""


class CalibrationError(CompressError):
    """Calibration text that cannot be read or is too short."""


class NumericalError(CompressError):
    """A computation that did not stay finite or could not be made positive definite."""


class ArtifactError(CompressError):
    """A compressed checkpoint that is corrupt or does not match its manifest."""


class VerifyError(CompressError):
    """The reloaded artifact does not compute what the in-memory quantized model computed."""


class EnvironmentProblem(CompressError):
    """A device, disk, directory or package that is not there or not usable."""


class RunLocked(CompressError):
    """Another process works in the same run directory."""


class GateFailure(CompressError):
    """Quality or size fell behind the committed baseline by more than the recipe's limits."""

    exit_code = 3
