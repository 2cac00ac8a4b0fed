"""A twin of Compute Engine on loopback HTTP whose disks hold bytes, for Google's own client library.

No emulator of it is known. The library's tables of paths and its message types do the parsing, so that what Compute
Engine doesn't have is refused.

`world` has the objects and the time, `actions` the API, `filters` the lists' language, `policy` IAM, `wire` the
format, `server` all faces over HTTP (the API, the metadata server, OAuth), `disks` the bytes and the loop devices that
stand for attached disks.
"""

from tests.twins.gce.disks import Disks
from tests.twins.gce.server import Twin
from tests.twins.gce.world import Limits
from tests.twins.knobs import Clock, Fault

__all__ = ["Clock", "Disks", "Fault", "Limits", "Twin"]
