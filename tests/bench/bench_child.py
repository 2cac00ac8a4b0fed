"""A take with a clock: the command's own `main`, with one around the provider's methods and every import. Must import
nothing that Python itself hasn't, or it would take that from the command's own time.
"""

import sys
import time

ENTERED = time.monotonic()
PHASES = ("start", "imports", "rest", "check", "storage", "seal", "read back", "exit")
METHODS = {
    "availability": "check",
    "claim": "check",
    "check": "check",
    "prepare": "storage",
    "create": "storage",
    "mark": "seal",
    "snapshots": "read back",
    "attachments": "read back",
}


class Clock:
    """Time since the last change of phase is charged to the innermost one."""

    def __init__(self):
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.stack = ["rest"]
        self.since = ENTERED

    def charge(self):
        now = time.monotonic()
        self.spent[self.stack[-1]] += now - self.since
        self.since = now
        return now

    def inside(self, phase, function):
        def call(*args, **kwargs):
            self.charge()
            self.stack.append(phase)
            try:
                made = function(*args, **kwargs)
                # A generator does its work later, in somebody else's phase: let it do it here.
                return iter(list(made)) if hasattr(made, "__next__") else made
            finally:
                self.charge()
                self.stack.pop()

        call.clocked = True
        return call


def main():
    """argv: started (time.monotonic() s of who started us), where to write the report, the command's words."""
    import builtins

    clock = Clock()
    clock.spent["start"] = ENTERED - float(sys.argv[1])
    where = sys.argv[2]
    builtins.__import__ = clock.inside("imports", builtins.__import__)
    import importlib

    importlib.import_module = clock.inside("imports", importlib.import_module)
    from snapshotter import __main__

    __main__.make_fit()
    from snapshotter import cli, provider

    plain = provider.load

    def load(name):
        kind = plain(name)
        for method, phase in METHODS.items():
            function = getattr(kind, method)
            if not hasattr(function, "clocked"):
                setattr(kind, method, clock.inside(phase, function))
        return kind

    provider.load = load
    run = cli.run

    def timed(words):
        code = run(words)
        ended = clock.charge()
        with open(where, "w", encoding="ascii") as file:
            file.write(repr({"ended": ended, "spent": clock.spent, "modules": len(sys.modules)}))
        return code

    cli.run = timed
    sys.argv = ["snapshotter", *sys.argv[3:]]
    __main__.main()


if __name__ == "__main__":
    main()
