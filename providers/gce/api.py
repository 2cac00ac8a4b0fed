"""Compute Engine's API in one project: every call under a deadline and a quota, made once by Google's client and
repeated by us, its errors told as ours; and its operations, waited for by us. Must know no set.

The client's own retries are off: they know no deadline of ours. Its own waiting for operations isn't used either: it
asks the public endpoint whatever endpoint is configured (CLOUD.md). So every call is a plain method or a `*_unary` one.
A mutating call carries a requestId, with which it may be repeated: it is answered with the operation that it began
first.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from providers.gce import errors
from snapshotter.core.errors import PreconditionError, SnapshotterError, StorageError, UsageError, pip_install
from snapshotter.core.model import Report, Tagged, no_report
from snapshotter.core.remote import Clock, Deadline, Lost, MinuteQuota, Temporary, operation_id, persist, poll

CALL_S = 120.0
_ANSWER_S = 20.0
_PAGE = 500
_SCOPES = ("https://www.googleapis.com/auth/compute",)
_IMPERSONATING = ("https://www.googleapis.com/auth/cloud-platform",)
Operation = Any
CREDENTIALS = "give the instance a service account, or set GOOGLE_APPLICATION_CREDENTIALS"
_UNREACHABLE = "UNREACHABLE"


class Unreachable(StorageError):
    """What is in a zone or a region isn't known now."""

    scopes: frozenset[str] = frozenset()  # `zones/Z`, `regions/R`; empty where Google doesn't say which
    tagged: Sequence[Tagged] | None = None  # the nodes that are known all the same, which functions.py takes


class Api:
    """Threads may share one; processes may not (`connect` sees to that)."""

    def __init__(self, project: str | None, endpoint: str | None, impersonate: str | None, clock: Clock) -> None:
        self._project, self._endpoint, self._impersonate = project, endpoint, impersonate
        self.clock = clock
        self._lock = threading.RLock()
        self._clients: dict[str, Any] = {}
        self._quotas: dict[str, MinuteQuota] = {}
        self._given: tuple[Any, str | None] | None = None

    def deadline(self, what: str, seconds: float = CALL_S) -> Deadline:
        return Deadline(seconds, self.clock, what)

    @property
    def project(self) -> str:
        """Raises UsageError where none is known."""
        found = self._project or self._credentials()[1]
        if not found:
            cure = "set `project` in [gcp], or -o project="
            raise UsageError("no Google Cloud project is known", object="gce", cure=cure)
        return found

    # -- calls --------------------------------------------------------------------------------------------------

    def call(self, action: str, within: Deadline, **fields: Any) -> Any:
        """One call, `Disks.get`, with the fields of its request. Raises what `errors` tells, StorageError at the
        deadline."""
        service, _, method = action.partition(".")
        quota = self._quota(action)
        lost = False

        def attempt() -> Any:
            nonlocal lost
            client, project = self.client(service), self.project
            quota.take(within)
            if (left := within.left()) <= 0:
                raise within.over()
            request = {"project": project, **fields}
            try:
                return getattr(client, method)(request=request, retry=None, timeout=min(_ANSWER_S, left))
            except Exception as error:
                refusal = self._told(error, action, within, quota)
                lost = lost or isinstance(refusal, Lost)
                if isinstance(refusal, SnapshotterError) and lost:
                    errors.after_loss(refusal)
                raise refusal from None

        return persist(attempt, within, again_after_loss=True)

    def pages(self, action: str, within: Deadline, **fields: Any) -> Iterator[Any]:
        """All items of a listing; of an aggregated one, of all its scopes. Raises Unreachable at its end if there may
        be more: Google answers without a scope that it can't ask, and says so beside it alone."""
        token: dict[str, str] = {}
        missing: set[str] = set()
        elsewhere: set[str] = set()  # where, nobody says but in words
        while True:
            page = next(self.call(action, within, max_results=_PAGE, **fields, **token).pages)
            scopes = page.items if action.endswith(".aggregated_list") else {}
            missing |= {scope for scope, scoped in scopes.items() if scoped.warning.code == _UNREACHABLE}
            if page.warning.code == _UNREACHABLE:
                named = {each.value for each in page.warning.data if each.key == "scope"}
                missing |= named
                elsewhere |= set() if named else {page.warning.message or "a zone"}
            for scoped in scopes.values():
                yield from getattr(scoped, _SCOPED[action])
            if not action.endswith(".aggregated_list"):
                yield from page.items
            if not page.next_page_token:
                break
            token = {"page_token": page.next_page_token}
        if missing or elsewhere:
            why = f"Compute Engine can't say what is in {', '.join(sorted(missing | elsewhere))} now"
            cure = "try again when it can: https://status.cloud.google.com"
            error = Unreachable(why, object=within.what, cure=cure)
            error.scopes = frozenset() if elsewhere else frozenset(missing)
            raise error

    def begin(self, action: str, within: Deadline, name: str, **fields: Any) -> Operation:
        """A mutating call about the object `name`: what it began. However often an answer is lost, it begins once."""
        once = {"request_id": operation_id(action, name, os.urandom(8).hex())}
        return self.call(f"{action}_unary", within, **({} if action in _WITHOUT_ID else once), **fields)

    def done(self, operation: Operation, within: Deadline) -> bool | None:
        """True when it is through, None while it isn't. Raises what it failed with, `Temporary` if that was because of
        too many calls in this minute: then it may be begun again."""
        from google.cloud import compute_v1

        if operation.status != compute_v1.Operation.Status.DONE:
            where = {key: _last(getattr(operation, key)) for key in ("zone", "region") if getattr(operation, key)}
            service = f"{next(iter(where), 'global').capitalize()}Operations"
            operation = self.call(f"{service}.get", within, operation=operation.name, **where)
        if operation.status != compute_v1.Operation.Status.DONE:
            return None
        for failed in operation.error.errors:
            if errors.plain(failed.code) in errors.THROTTLED:
                self._quota(operation.operation_type).throttled()
                raise Temporary(failed.code, throttled=True)
            raise errors.no_effect(errors.told(failed.code, failed.message, operation.operation_type, within.what))
        if operation.http_error_status_code:
            said = operation.http_error_message
            raise errors.told(str(operation.http_error_status_code), said, operation.operation_type, within.what)
        return True

    def wait(self, operation: Operation, within: Deadline, report: Report = no_report) -> None:
        """Until it is through. Raises as `done`, StorageError at the deadline."""
        poll(lambda: self.done(operation, within), within, first_s=0.2, most_s=5.0, report=report)

    def do(self, action: str, within: Deadline, name: str, report: Report = no_report, **fields: Any) -> None:
        """A mutating call, and what it began, to its end."""

        def attempt() -> None:
            self.wait(self.begin(action, within, name, **fields), within, report)

        persist(attempt, within, again_after_loss=False)

    def _quota(self, action: str) -> MinuteQuota:
        """Google counts looking, looking at operations, listing and changing apart. An operation's own type (`insert`)
        is a change."""
        service, _, method = action.rpartition(".")
        kind = {"get": "look", "list": "list", "aggregated_list": "list"}.get(method, "change")
        kind = "operation" if service.endswith("Operations") else kind
        with self._lock:
            return self._quotas.setdefault(kind, MinuteQuota(self.clock))

    def _told(self, error: Exception, action: str, within: Deadline, quota: MinuteQuota) -> Exception:
        """What Google's client raised as one of ours; what is a bug stays as it is."""
        import requests
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, TransportError

        if isinstance(error, SnapshotterError):
            return error
        if isinstance(error, GoogleAPICallError):
            status = int(error.code or 0)
            said = [str(each.get("reason", "")) for each in error.errors if isinstance(each, dict)]
            reason = errors.plain(next(iter(said), "") or str(error.reason or "") or _STATUS.get(status, str(status)))
            if status == 429 or reason in errors.THROTTLED:
                quota.throttled()
                return Temporary(reason, throttled=True)
            if status >= 500 or status == 408:
                return Lost(f"status {status}")
            message = str(error.message).partition(": ")[2] or str(error.message)
            return errors.told(reason, message, action.replace("_unary", ""), within.what)
        if isinstance(error, TransportError) or (isinstance(error, GoogleAuthError) and error.retryable):
            return Temporary(f"Google gives no token: {_words(error)}")
        if isinstance(error, requests.exceptions.RequestException):
            return Lost(type(error).__name__)
        if isinstance(
            error, GoogleAuthError | OSError
        ):  # a token is asked for when it is needed, by a file or a program
            return PreconditionError(f"Google gives no token: {_words(error)}", object=within.what, cure=errors.LOGIN)
        return error

    # -- clients ------------------------------------------------------------------------------------------------

    def client(self, service: str) -> Any:
        with self._lock:  # making one isn't safe in threads
            if service not in self._clients:
                self._clients[service] = self._make(service)
            return self._clients[service]

    def _make(self, service: str) -> Any:
        credentials = self._credentials()[0]
        from google.api_core.client_options import ClientOptions
        from google.cloud import compute_v1

        options = ClientOptions(api_endpoint=self._endpoint) if self._endpoint else None
        try:
            return getattr(compute_v1, f"{service}Client")(credentials=credentials, client_options=options)
        except Exception as error:  # as below: certificates, GOOGLE_API_* and GOOGLE_CLOUD_* of the environment
            why = f"Google's client can't be made: {_words(error)}"
            raise PreconditionError(why, object="gce", cure="mend the environment variable it names") from None

    def _credentials(self) -> tuple[Any, str | None]:
        """Google's credentials for this place, and the project that they are of."""
        with self._lock:
            if self._given is None:
                try:
                    import google.auth
                    import google.cloud.compute_v1
                except ImportError:
                    raise PreconditionError(
                        "google-cloud-compute isn't installed", object="gce", cure=pip_install("gcp")
                    ) from None
                try:
                    scopes = _IMPERSONATING if self._impersonate else _SCOPES
                    found, project = google.auth.default(scopes=scopes)
                    if self._impersonate:
                        from google.auth import impersonated_credentials

                        found = impersonated_credentials.Credentials(  # type: ignore[no-untyped-call]
                            source_credentials=found, target_principal=self._impersonate, target_scopes=list(_SCOPES)
                        )
                except Exception as error:  # a file that is none of Google's meets any kind of error in their library
                    said = "" if "were not found" in str(error) else f": {_words(error)}"
                    raise PreconditionError(
                        f"there are no Google credentials{said}", object="gce", cure=CREDENTIALS
                    ) from None
                self._given = found, project
            return self._given


#: Has no requestId: its fingerprint has the same effect.
_WITHOUT_ID = frozenset({"Snapshots.set_labels"})
_SCOPED = {"Disks.aggregated_list": "disks", "InstantSnapshots.aggregated_list": "instant_snapshots"}
_STATUS = {401: "authError", 403: "forbidden", 404: "notFound", 409: "alreadyExists", 412: "conditionNotMet"}


def _words(error: Exception) -> str:
    """What an error of Google's library says: its causes are beside it, for programmers."""
    said = str(error if isinstance(error, OSError) or not error.args else error.args[0])
    return " ".join(said.split())[:200] or type(error).__name__


def _last(link: str) -> str:
    return link.rpartition("/")[2]


@functools.cache
def _shared(pid: int, project: str | None, endpoint: str | None, impersonate: str | None, clock: Clock) -> Api:
    return Api(project, endpoint, impersonate, clock)


def connect(project: str | None, endpoint: str | None, impersonate: str | None, clock: Clock) -> Api:
    """One per account and project in this process: its quotas are for all who use it."""
    return _shared(os.getpid(), project, endpoint or os.environ.get("GCE_ENDPOINT"), impersonate, clock)
