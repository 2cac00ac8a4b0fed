"""Values as an operator writes them in the config: durations, sizes, percentages, times of day, where a secret is. Each
is a number or a string of Python's, read by `parse` (ValueError with an example) and written by `text`.
"""

from __future__ import annotations

import re

_DURATION_UNITS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_SIZE_UNITS = {f"{letter}B": 1000**power for power, letter in enumerate(["", "K", "M", "G", "T", "P"])} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)
}


class Seconds(float):
    """A duration, from text such as `24h`, `7d`, `5s`, `250ms` (whole milliseconds)."""

    @classmethod
    def parse(cls, text: str) -> Seconds:
        match = re.fullmatch(r"([0-9]{1,9})(ms|[smhdw])", text)
        if match is None:
            raise ValueError(f'{text!r} is no duration; write one as "24h", "7d", "5s" or "250ms"')
        return cls(int(match[1]) * _DURATION_UNITS[match[2]] / 1000)

    def text(self) -> str:
        """Inverse of `parse`."""
        count = round(self * 1000)
        unit, size = next((u, s) for u, s in _DURATION_UNITS.items() if u != "w" and count % s == 0)
        return f"{count // size}{unit if count else 's'}"


class Bytes(int):
    """A size, from text such as `500GB` (10^9) or `500GiB` (2^30)."""

    @classmethod
    def parse(cls, text: str) -> Bytes:
        match = re.fullmatch(r"([0-9]{1,18}) ?([KMGTP]i?B|B)", text)
        if match is None:
            raise ValueError(f'{text!r} is no size; write one as "500GB" or "500GiB"')
        return cls(int(match[1]) * _SIZE_UNITS[match[2]])

    def text(self) -> str:
        """Inverse of `parse`."""
        units = sorted(_SIZE_UNITS.items(), key=lambda item: -item[1])
        unit, size = next((u, s) for u, s in units if self % s == 0) if self else ("B", 1)
        return f"{self // size}{unit}"


class Share(float):
    """A part of a whole, 0 <= x < 1, from text such as `10%`."""

    @classmethod
    def parse(cls, text: str) -> Share:
        match = re.fullmatch(r"([0-9]{1,2}(\.[0-9]{1,2})?)%", text)
        if match is None:
            raise ValueError(f'{text!r} is no percentage below 100; write one as "10%"')
        return cls(float(match[1]) / 100)

    def text(self) -> str:
        """Inverse of `parse`."""
        return f"{round(self * 100, 2):g}%"


class Clock(int):
    """A time of day as minutes after 00:00 UTC, from text such as `02:00`."""

    @classmethod
    def parse(cls, text: str) -> Clock:
        match = re.fullmatch(r"([0-9]{2}):([0-9]{2})", text)
        if match is None or int(match[1]) > 23 or int(match[2]) > 59:
            raise ValueError(f'{text!r} is no time of day; write one as "02:00" (UTC)')
        return cls(int(match[1]) * 60 + int(match[2]))

    def text(self) -> str:
        """Inverse of `parse`."""
        return f"{self // 60:02d}:{self % 60:02d}"


class Secret(str):
    """Where a secret is found, never the secret: `env:NAME`, or `file:/path` (its first line)."""

    @classmethod
    def parse(cls, text: str) -> Secret:
        if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:/[^\0]+", text):
            raise ValueError('it may hold a secret: write "env:NAME" or "file:/path", and the URL there')
        return cls(text)

    def text(self) -> str:
        return str(self)


#: All of these.
TEXTUAL = (Seconds, Bytes, Share, Clock, Secret)
#: As an operator writes them.
EXAMPLES = {Seconds: "24h", Bytes: "500GB", Share: "10%", Clock: "02:00", Secret: "env:NAME"}
