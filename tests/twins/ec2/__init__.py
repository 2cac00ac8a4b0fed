"""A twin of EC2 on loopback HTTP whose disks hold bytes, for real boto3.

Written on botocore's own model of the service instead of moto's backends: of moto nearly every action that matters here
would have had to be replaced (it holds no bytes, completes at once, ignores ClientToken, ExcludeDataVolumeIds and
paging), and what it ignores passes silently, while here a parameter that EC2 doesn't have is refused.

`world` has the objects and the time, `actions` the API, `policy` IAM, `wire` the format, `server` both faces over HTTP
(EC2, and the instance metadata service), `disks` the bytes and the loop devices that stand for NVMe disks.
"""

from tests.twins.ec2.disks import Disks
from tests.twins.ec2.server import Twin
from tests.twins.ec2.world import Limits
from tests.twins.knobs import Clock, Fault

__all__ = ["Clock", "Disks", "Fault", "Limits", "Twin"]
