"""What Compute Engine's error reasons mean for an operator: the exit code and one line with the cure. Must know no
call.

The same thing is called `quotaExceeded` in an HTTP answer and `QUOTA_EXCEEDED` inside an operation: here both are
`quotaexceeded`. Sources: the API's guides to errors and to resource exhaustion. A reason that isn't here is exit 6 with
Google's own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError, StorageError

LIMIT = "ask Google for a higher quota, or delete old sets"
DENIED = "grant it: docs/gcp.md has the roles"
LOGIN = "log in again (gcloud auth application-default login), or mend the instance's service account"
WHERE = "is it in another zone or project? -o zone=, -o project=, or `project` in [gcp]"
KEY = "grant the Compute Engine service agent cloudkms.cryptoKeyEncrypterDecrypter on the key: docs/gcp.md"

#: Refused because there were too many calls in this minute: nothing happened.
THROTTLED = frozenset({"ratelimitexceeded", "userratelimitexceeded"})
#: It is being changed by another operation, or isn't all there yet: it can be asked for again.
NOT_NOW = frozenset({"resourcenotready", "resourceinuse", "operationcanceledbyuser", "resourceoperationinprogress"})
IN_USE = "resourceinusebyanotherresource"
EXISTS = frozenset({"alreadyexists", "resourcealreadyexists"})
STALE = frozenset({"conditionnotmet", "preconditionfailed"})

#: reason -> (what to raise, what to say instead of Google's words ('' for those), the cure)
TABLE: Mapping[str, tuple[type[SnapshotterError], str, str]] = {
    "autherror": (PreconditionError, "Google doesn't accept the credentials", LOGIN),
    "unauthorized": (PreconditionError, "Google doesn't accept the credentials", LOGIN),
    "accessnotconfigured": (
        PreconditionError,
        "the Compute Engine API isn't enabled in the project",
        "gcloud services enable compute.googleapis.com",
    ),
    "insufficientpermissions": (
        PreconditionError,
        "the instance's access scopes don't allow it",
        "give the instance the scope cloud-platform",
    ),
    "access_token_scope_insufficient": (
        PreconditionError,
        "the instance's access scopes don't allow it",
        "give the instance the scope cloud-platform",
    ),
    "forbidden": (PreconditionError, "", DENIED),
    "permissionsdenied": (PreconditionError, "", DENIED),
    "quotaexceeded": (StorageError, "", LIMIT),
    "limitexceeded": (StorageError, "", LIMIT),
    "resourceoperationrateexceeded": (
        StorageError,
        "too often: Compute Engine does that to a disk or a snapshot every ten minutes, six times an hour at most",
        "wait, and take it again",
    ),
    "zoneresourcepoolexhausted": (StorageError, "the zone has no such disks left", "try another -o zone="),
    "zoneresourcepoolexhaustedwithdetails": (StorageError, "the zone has no such disks left", "try another -o zone="),
    "notfound": (NotFoundError, "", WHERE),
    "resourcenotfound": (NotFoundError, "", WHERE),
    IN_USE: (BusyError, "", "detach it, or wait for what uses it"),
    "resourceinuse": (BusyError, "", "wait for what uses it"),
    "resourcenotready": (BusyError, "is not ready", "try again in a moment"),
    "alreadyexists": (BusyError, "exists already, and is none of this set's", "remove or rename it"),
    "resourcealreadyexists": (BusyError, "exists already, and is none of this set's", "remove or rename it"),
}


def plain(reason: str) -> str:
    """One spelling of a reason."""
    return reason.replace("_", "").lower()


def reason_of(error: SnapshotterError) -> str:
    """Google's own reason behind a refusal, in our spelling."""
    return str(vars(error).get("gce", ""))


def told(reason: str, message: str, action: str, named: str) -> SnapshotterError:
    """Google's refusal of `action` as one of ours. `named`: the object that the call was about."""
    reason = plain(reason)
    kind, said, cure = TABLE.get(reason, (StorageError, "", ""))
    if re.search(r"cloud ?kms", message, re.IGNORECASE):
        key = re.search(r"projects/[^\s'\",]+/cryptoKeys/[^\s'\",/]+", message)
        kind, said, cure = PreconditionError, f"the key {key[0] if key else ''} can't be used".replace("  ", " "), KEY
    elif kind is PreconditionError and reason in ("forbidden", "permissionsdenied"):
        which = re.search(r"'(compute\.[\w.]+)'", message)
        said = f"may not {which[1]}" if which else ""
    elif kind is NotFoundError:
        which = re.search(r"projects/[^\s']+", message)
        said = f"there is no {which[0]}" if which else "is not there"
    if not said:
        said = f"Google refused {action}: {message.strip() or reason} ({reason})"
    refusal = kind(said, object=named, cure=cure or "see the message; the project's logs may say more")
    vars(refusal)["gce"] = reason
    return refusal
