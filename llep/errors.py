"""What can go wrong for a user: each error names the value, the rule and the way out, and carries a stable code."""

from __future__ import annotations


class LlepError(Exception):
    """An error that a user can act on. `code` is stable and appears in HTTP bodies; `param` names the culprit."""

    code = "llep_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(cls: type[LlepError], message: str, param: str | None) -> LlepError:
    return cls(message, param=param)


class SettingsError(LlepError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or can't change while serving."""

    code = "invalid_setting"


class UnknownEngine(LlepError):
    """No engine of that name has reported."""

    code = "unknown_engine"


class RevisionConflict(LlepError):
    """Somebody else changed the settings since the caller read them."""

    code = "revision_conflict"


class UnknownPlan(LlepError):
    """No sampled plan of that id is kept."""

    code = "unknown_plan"


class PlacementRefused(LlepError):
    """Resident replicas that don't fit the engine. The message starts with the name of the rule."""

    code = "placement_refused"


class UnknownRevision(LlepError):
    """No revision of that number is kept."""

    code = "unknown_revision"


class UnknownRecording(LlepError):
    """There is no recording of that id."""

    code = "unknown_recording"


class RecordingConflict(LlepError):
    """What is asked of a recording does not go with the state it is in."""

    code = "recording_conflict"


class SchedulerUnreachable(LlepError):
    """The scheduler (a Ray actor) did not answer."""

    code = "scheduler_unreachable"


class StoreUnavailable(LlepError):
    """The scheduler's state folder can't be written, so nothing that must last can be accepted."""

    code = "store_unavailable"


class UnsupportedConfiguration(LlepError):
    """The engine is configured in a way that llep can't work with."""

    code = "unsupported_configuration"


ERRORS_BY_CODE: dict[str, type[LlepError]] = {
    cls.code: cls
    for cls in (
        *(LlepError, SettingsError, UnknownEngine, UnknownRevision, UnknownPlan, RevisionConflict),
        *(PlacementRefused, SchedulerUnreachable, StoreUnavailable, UnsupportedConfiguration),
        *(UnknownRecording, RecordingConflict),
    )
}
