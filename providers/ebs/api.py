"""EC2's API in one region for one account: every call under a deadline and a token bucket, made once by boto3 and
repeated by us, its errors told as ours. Must know no set.

boto3's own retries are off: they know no deadline, and repeat a CreateSnapshots whose reply was lost, which makes two
(CLOUD.md). What this process has itself made, marked or deleted is remembered for a while, as EC2 may list it late.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from providers.ebs.errors import CREDENTIALS, LOGIN, THROTTLED, UNSURE, told
from snapshotter.core.errors import PreconditionError, SnapshotterError, UsageError, pip_install
from snapshotter.core.remote import Clock, Deadline, Lost, Temporary, TokenBucket, persist

#: Calls that EC2 takes of an API at once, and per second after that (measured and guides: 50 to 100, 5 to 20). A
#: little below, as its clock isn't ours; where an account has less the bucket finds out.
BURST, PER_SECOND = 48.0, 19.5
#: One client per read timeout, as boto3 can't change it later: a call gets the largest that its deadline has room for.
_TIMEOUTS = (20.0, 10.0, 4.0, 2.0, 1.0)
CALL_S = 120.0
REMEMBERED_S = 120.0
PAGE = 1000
AT_ONCE = 200


class Api:
    """Threads may share one; processes may not (`connect` sees to that)."""

    def __init__(self, region: str | None, profile: str | None, role: str | None, clock: Clock) -> None:
        self._region, self._profile, self._role = region, profile, role
        self.clock = clock
        self._lock = threading.RLock()
        self.looking = threading.Lock()  # held by the thread that makes a listing which all share
        self._session: Any = None
        self._clients: dict[float, Any] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self.memory = Memory(clock)

    def deadline(self, what: str, seconds: float = CALL_S) -> Deadline:
        return Deadline(seconds, self.clock, what)

    # -- calls --------------------------------------------------------------------------------------------------

    def call(self, action: str, within: Deadline, *, again: bool = True, **parameters: Any) -> dict[str, Any]:
        """One call of boto3's method `action`. `again`: it may be made twice (it looks, or has a client token, or its
        second time is like its first). Raises what `errors` tells, `Lost` if not `again`, StorageError at the deadline.
        """

        def attempt() -> dict[str, Any]:
            self.bucket(action).take(within)
            try:  # the credentials are looked for when the client is made, or when it signs
                return getattr(self.client(within), action)(**parameters)  # type: ignore[no-any-return]
            except SnapshotterError:
                raise
            except Exception as error:
                raise self._told(error, action, within) from None

        return persist(attempt, within, again_after_loss=again)

    def pages(self, action: str, key: str, within: Deadline, **parameters: Any) -> Iterator[dict[str, Any]]:
        """All items of a listing."""
        token: dict[str, Any] = {}
        while True:
            page = self.call(action, within, MaxResults=PAGE, **parameters, **token)
            yield from page[key]
            if not page.get("NextToken"):
                return
            token = {"NextToken": page["NextToken"]}

    def bucket(self, action: str) -> TokenBucket:
        with self._lock:
            if action not in self._buckets:
                self._buckets[action] = TokenBucket(BURST, PER_SECOND, self.clock)
            return self._buckets[action]

    def _told(self, error: Exception, action: str, within: Deadline) -> Exception:
        """What boto3 raised as one of ours."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        if isinstance(error, boto.ClientError):
            answer = error.response.get("Error", {})
            code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in THROTTLED:
                self.bucket(action).throttled()
                return Temporary(code, throttled=True)
            if code in UNSURE or status >= 500:
                return Lost(code)
            refusal = told(code, message, action, within.what)
            vars(refusal)["ec2"] = code
            return refusal
        if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
            return Temporary("no connection")
        if isinstance(error, boto.HTTPClientError | boto.ResponseStreamingError | ResponseParserError):
            return Lost(type(error).__name__)
        return unusable(error, within.what)

    # -- clients ------------------------------------------------------------------------------------------------

    def client(self, within: Deadline) -> Any:
        """Whose read timeout leaves the deadline intact."""
        left = within.left()
        fitting = next((timeout for timeout in _TIMEOUTS if timeout <= left), None)
        if fitting is None:
            raise within.over()
        with self._lock:  # making one isn't safe in threads
            if fitting not in self._clients:
                self._clients[fitting] = self._make(fitting)
            return self._clients[fitting]

    @property
    def region(self) -> str:
        return str(self.boto().region_name)

    def warm(self, seconds: float) -> None:
        """Make the client that a call within so many seconds will use: it takes its time, and soon there is none."""
        fitting = [timeout for timeout in _TIMEOUTS if timeout <= seconds]
        for timeout in fitting[:2]:
            self.client(self.deadline("EC2", timeout + 0.5))

    def _make(self, timeout: float) -> Any:
        from botocore.config import Config

        config = Config(
            connect_timeout=min(timeout, 3.0),
            read_timeout=timeout,
            retries={"total_max_attempts": 1},
            max_pool_connections=32,
            user_agent_extra="snapshotter",
        )
        return self.boto().client("ec2", config=config)

    def boto(self) -> Any:
        """boto3's session."""
        if self._session is None:
            try:
                import boto3
                from botocore import exceptions as boto
            except ImportError:
                raise PreconditionError("boto3 isn't installed", object="ebs", cure=pip_install("aws")) from None
            try:
                session = boto3.Session(profile_name=self._profile, region_name=self._region)
                if session.region_name is not None:
                    self._session = _assuming(session, self._role) if self._role else session
            except SnapshotterError:
                raise
            except boto.ProfileNotFound:
                raise UsageError(
                    "there is no such AWS profile", object=str(self._profile), cure="mend `profile` in [aws]"
                ) from None
            except Exception as error:
                raise unusable(error, "ebs") from None
            if session.region_name is None:
                raise UsageError("no AWS region is known", object="ebs", cure="set `region` in [aws], or -o region=")
        return self._session


def unusable(error: Exception, what: str) -> Exception:
    """A failure of boto3's before anything was sent: the credentials, or what it was told of them. What is a bug stays
    as it is."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ParamValidationError) or not isinstance(error, boto.BotoCoreError | OSError):
        return error
    if isinstance(error, boto.InvalidRegionError):
        return UsageError("is no name of an AWS region", object=what, cure="mend `region` or `copy_to` in [aws]")
    if isinstance(error, boto.NoCredentialsError):
        return PreconditionError("there are no AWS credentials", object=what, cure=CREDENTIALS)
    said = " ".join(str(error).split())[:200]
    return PreconditionError(f"no AWS credentials: {said}", object=what, cure=LOGIN)


def _assuming(session: Any, role: str) -> Any:
    """A session under another role, its credentials renewed when they end."""
    import boto3
    from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
    from botocore.session import get_session

    below = session._session  # boto3 has no public way to its botocore session
    if (credentials := below.get_credentials()) is None:
        raise PreconditionError("there are no AWS credentials to assume it with", object=role, cure=CREDENTIALS)
    fetcher = AssumeRoleCredentialFetcher(
        client_creator=below.create_client,
        source_credentials=credentials,
        role_arn=role,
        extra_args={"RoleSessionName": "snapshotter"},
    )
    above = get_session()
    above._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
    return boto3.Session(botocore_session=above, region_name=session.region_name)


class Memory:
    """What this process did lately, to be laid over what EC2 lists, which may be older. Threads may share one: each
    look is at a copy, made in one step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._made: dict[str, tuple[float, dict[str, Any]]] = {}
        self._tags: dict[str, tuple[float, dict[str, str | None]]] = {}
        self._deleted: dict[str, float] = {}

    def _until(self) -> float:
        return self._clock.now() + REMEMBERED_S

    def made(self, name: str, item: Mapping[str, Any]) -> None:
        self._made[name] = (self._until(), dict(item))

    def tagged(self, name: str, changes: Mapping[str, str | None]) -> None:
        before = self._tags.get(name, (0.0, {}))[1]
        self._tags[name] = (self._until(), {**before, **changes})

    def deleted(self, name: str) -> None:
        self._deleted[name] = self._until()
        self._made.pop(name, None)

    def is_ours(self, name: str) -> bool:
        """Made just now: that EC2 doesn't know it yet means nothing."""
        self._forget()
        return name in self._made

    def over(self, listed: Iterator[dict[str, Any]], key: str, kind: str) -> Iterator[dict[str, Any]]:
        """`listed`, as it will be when EC2 has caught up. `key`: of the id, which begins with `kind`."""
        self._forget()
        late = {name: item for name, (_, item) in list(self._made.items()) if name.startswith(kind)}
        for item in listed:
            if late.pop(item[key], None) is not None:
                self._made.pop(item[key], None)  # EC2 has caught up: from now on its word counts
            if item[key] not in self._deleted:
                yield self.current(item, key)
        for item in late.values():
            yield self.current(item, key)

    def current(self, item: dict[str, Any], key: str) -> dict[str, Any]:
        """An item with the tags that we gave it since."""
        remembered = self._tags.get(item[key])
        if remembered is None:
            return item
        tags = {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])} | remembered[1]
        return {**item, "Tags": [{"Key": name, "Value": value} for name, value in tags.items() if value is not None]}

    def _forget(self) -> None:
        now = self._clock.now()
        for timed in (self._made, self._tags):
            for name in [name for name, (until, _) in list(timed.items()) if until < now]:
                timed.pop(name, None)
        for name in [name for name, until in list(self._deleted.items()) if until < now]:
            self._deleted.pop(name, None)


@functools.cache
def _shared(where: tuple[int, str], region: str | None, profile: str | None, role: str | None, clock: Clock) -> Api:
    return Api(region, profile, role, clock)


def connect(region: str | None, profile: str | None, role: str | None, clock: Clock) -> Api:
    """One per account and region in this process: its buckets and its memory are for all who use it."""
    where = (os.getpid(), os.environ.get("AWS_ENDPOINT_URL_EC2", ""))
    return _shared(where, region, profile, role, clock)
