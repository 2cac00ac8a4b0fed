"""What an NVMe disk says of itself beyond sysfs: the vendor's own part of its namespace's identity. Knows no vendor.

Source: linux/nvme_ioctl.h; NVM Express, "Identify Namespace data structure" (bytes 384 on are the vendor's).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

_IOCTL_ID = 0x4E40
_IOCTL_ADMIN_CMD = 0xC0484E41
_IDENTIFY = 0x06
_LENGTH, _VENDOR = 4096, 384
_COMMAND = struct.Struct("=BBHIIIQQIIIIIIIIII")


def identity(device: str) -> bytes:
    """The 4096 bytes of the namespace's identity. Raises OSError (not an NVMe disk, not root)."""
    data = ctypes.create_string_buffer(_LENGTH)
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        namespace = fcntl.ioctl(fd, _IOCTL_ID)
        address = ctypes.addressof(data)
        command = _COMMAND.pack(_IDENTIFY, 0, 0, namespace, 0, 0, 0, address, 0, _LENGTH, *[0] * 8)
        fcntl.ioctl(fd, _IOCTL_ADMIN_CMD, command)
    finally:
        os.close(fd)
    return data.raw


def vendors_part(device: str) -> bytes:
    """As the vendor wrote it, without the zeros behind it. Raises OSError."""
    return identity(device)[_VENDOR:].rstrip(b"\0")
