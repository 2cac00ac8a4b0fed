"""What EC2's error codes mean for an operator: the exit code and one line with the cure. Must know no call.

Source: the EC2 API's table of error codes. A code that isn't here is exit 6 with EC2's own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
)

LIMIT = "ask AWS for a higher quota, or delete old sets"
DENIED = "grant it: docs/aws.md has the policies"
CREDENTIALS = "give the instance a role, or set AWS_PROFILE, or `profile` in [aws]"
LOGIN = "log in again, or mend the profile or the instance's role"
REGION = "is it in another region? name it with -o region=, or `region` in [aws]"

#: Refused because there were too many calls: nothing happened.
THROTTLED = frozenset(
    {
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "RequestThrottled",
        "RequestThrottledException",
        "EC2ThrottledException",
    }
)
#: EC2 failed at what it was asked: the effect may be there.
UNSURE = frozenset({"InternalError", "InternalFailure", "Unavailable", "ServiceUnavailable", "InternalServerError"})

#: code -> (what to raise, what to say instead of EC2's words ('' for those), the cure)
TABLE: Mapping[str, tuple[type[SnapshotterError], str, str]] = {
    "AuthFailure": (PreconditionError, "AWS doesn't accept the credentials", LOGIN),
    "InvalidClientTokenId": (PreconditionError, "AWS doesn't accept the credentials", LOGIN),
    "SignatureDoesNotMatch": (PreconditionError, "AWS doesn't accept the credentials", LOGIN),
    "UnrecognizedClientException": (PreconditionError, "AWS doesn't accept the credentials", LOGIN),
    "RequestExpired": (PreconditionError, "the credentials have expired, or the clock is wrong", LOGIN),
    "ExpiredToken": (PreconditionError, "the credentials have expired", LOGIN),
    "ExpiredTokenException": (PreconditionError, "the credentials have expired", LOGIN),
    "OptInRequired": (PreconditionError, "the account isn't enabled for this region", "enable it, or mend -o region="),
    "AccessDenied": (PreconditionError, "", DENIED),
    "UnauthorizedOperation": (PreconditionError, "", DENIED),
    "Client.KmsKeyInaccessible": (PreconditionError, "the KMS key can't be used", "allow it in the key's policy"),
    "KmsKeyNotAccessibleFault": (PreconditionError, "the KMS key can't be used", "allow it in the key's policy"),
    "KMSKeyNotAccessibleFault": (PreconditionError, "the KMS key can't be used", "allow it in the key's policy"),
    "SnapshotLimitExceeded": (StorageError, "the region has as many snapshots as the account may have", LIMIT),
    "VolumeLimitExceeded": (StorageError, "the account's quota of volume storage is used up", LIMIT),
    "MaxIOPSLimitExceeded": (StorageError, "the account's quota of IOPS is used up", LIMIT),
    "ResourceCountExceeded": (StorageError, "", LIMIT),
    "AttachmentLimitExceeded": (StorageError, "the instance has as many volumes as it may", "detach one"),
    "ConcurrentSnapshotLimitExceeded": (StorageError, "too many snapshots of the volume are pending", "wait for them"),
    "SnapshotCreationPerVolumeRateExceeded": (
        StorageError,
        "a volume takes one snapshot per 15 seconds",
        "wait, and take it again",
    ),
    "InsufficientVolumeCapacity": (StorageError, "AWS has no such volumes left in the zone", "try -o volume_type="),
    "InvalidVolume.NotFound": (NotFoundError, "there is no such volume", REGION),
    "InvalidSnapshot.NotFound": (NotFoundError, "there is no such snapshot", REGION),
    "InvalidInstanceID.NotFound": (NotFoundError, "there is no such instance", REGION),
    "InvalidZone.NotFound": (PreconditionError, "there is no such zone in the region", "mend -o zone="),
    "InvalidVolume.ZoneMismatch": (PreconditionError, "is in another zone than the instance", "mend -o zone="),
    "InvalidSnapshot.InUse": (BusyError, "an image (AMI) is made of it", "deregister the AMI"),
    "SnapshotLocked": (BusyError, "is locked", "unlock it: aws ec2 unlock-snapshot"),
    "OperationNotPermitted.SnapshotLocked": (BusyError, "is locked", "unlock it: aws ec2 unlock-snapshot"),
    "VolumeInUse": (BusyError, "", "detach it"),
    "IncorrectInstanceState": (PreconditionError, "the instance is not running", "start it"),
}


def told(code: str, message: str, action: str, named: str) -> SnapshotterError:
    """EC2's refusal of `action` as one of ours. `named`: the object that the call was about."""
    kind, said, cure = TABLE.get(code, (StorageError, "", ""))
    if code in ("UnauthorizedOperation", "AccessDenied"):
        # The rest is a long blob to decode, and an ARN with the session's name.
        which = re.search(r"to perform: (\S+)", message)
        said = f"may not {which[1] if which else action}"
    if not said:
        said = f"AWS refused {action}: {message.strip() or code} ({code})"
    return kind(said, object=named, cure=cure)
