"""The exceptions that callers may catch.

VitrineError
├── OptionError              a wrong option, request field or config key          exit code 2
├── ArtifactError            a missing, damaged or foreign checkpoint or artifact exit code 2
├── RuntimeUnavailableError  a runtime that is not installed or lacks its device  exit code 2
└── QualityError             a result under its floor, or a broken picture        exit code 1
"""


class VitrineError(Exception):
    """Base of every error that Vitrine raises on purpose; its text is written for the user."""

    exit_code = 2


class OptionError(VitrineError):
    """An option, request field or config key has a value that is not allowed."""


class ArtifactError(VitrineError):
    """A checkpoint, artifact or data folder is missing, damaged or of a kind we do not know."""


class RuntimeUnavailableError(VitrineError):
    """A runtime, extra or port that the command needs is not available on this machine."""


class QualityError(VitrineError):
    """A result is under its floor, or a picture is broken."""

    exit_code = 1
