"""What every verb works with: the config, the providers, the catalog, who may be told of progress.

One per run of the command. Loads a provider when it is first asked for, never at start-up.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import asdict

from snapshotter import catalog, provider
from snapshotter.core.errors import NotFoundError, PreconditionError, SnapshotterError, UsageError, foreseen, put_off
from snapshotter.core.model import Report, SnapshotSet, State, no_report
from snapshotter.nodes.config import Aws, Config, Gcp, Node
from snapshotter.nodes.target import canonical, resolve, target_of
from snapshotter.provider import Provider, Settings


class Session(Struct):
    """`provider_name` and `options` are what the command line said (--provider, -o), above any node's own."""

    config: Config
    provider_name: str | None = None
    options: Mapping[str, object] = {}
    report: Report = no_report
    notes: list[str] = []  # on what was selected, for a person
    only: str | None = None  # the one provider that there is: a function has no other
    _made: dict[tuple[str, str], Provider] = {}
    _everywhere: tuple[list[Provider], list[catalog.Unavailable]] | None = None

    def provider(self, name: str, node: Node | None = None, *, chosen: bool = True) -> Provider:
        """The instance for this node's options (the command line's go above them). Where it isn't the `chosen` one but
        one of all, options meant for another provider are left out. Raises UsageError, PreconditionError."""
        kind = provider.load(name)
        options: dict[str, object] = {}
        if kind.section:
            table = asdict(getattr(self.config, kind.section))
            given = {key: value for key, value in table.items() if value and key in kind.OPTIONS}
            options.update({key: " ".join(each) if isinstance(each, tuple) else each for key, each in given.items()})
        if node is not None and node.provider in (None, name):
            own: dict[str, object] = {**node.options, **({"store": node.store} if node.store else {})}
            options.update({key: value for key, value in own.items() if node.provider or key in kind.OPTIONS})
        if self.provider_name in (None, name):
            options.update({key: value for key, value in self.options.items() if chosen or key in kind.OPTIONS})
        floor = node.floor if node is not None else None
        paths: tuple[str, ...] = ()
        if not kind.traits.needs_host:  # one for a whole fleet: it knows no path, and has room without end
            floor = None
        elif node is None and not options:
            paths = tuple(sorted(canonical(other.path) for other in self.config.nodes.values()))
        elif node is not None:
            paths = (canonical(node.path),)
        key = (name, repr((sorted(options.items(), key=str), paths, floor)))
        if key not in self._made:
            settings = Settings(
                state=self.config.state,
                options=provider.parse_options(kind, options),
                paths=paths,
                report=self.report,
                **({"floor": floor} if floor is not None else {}),
            )
            self._made[key] = kind(settings)
        return self._made[key]

    def fit_options(self, found: SnapshotSet) -> None:
        """Raises UsageError for an option (-o) that none of the set's providers has."""
        kinds = [provider.load(name) for name in sorted({member.provider for member in found.birth.members})]
        for key, value in self.options.items():
            if not any(key in kind.OPTIONS for kind in kinds):
                provider.parse_options(kinds[0], {key: value})

    def everywhere(self, node: Node | None = None) -> tuple[list[Provider], list[catalog.Unavailable]]:
        """One instance of every provider in every way that the config uses it, for the catalog, less those that can't
        see anything here; and those that can't be asked, with the reason."""
        usual = node is None or self.config.nodes.get(node.name) is node
        if usual and self._everywhere is not None:
            return self._everywhere
        every = provider.names() if self.only is None else (self.only,)
        wanted: list[tuple[str, Node | None]] = [(name, None) for name in every if self._may_see(name)]
        for other in [*self.config.nodes.values(), *([node] if node is not None else [])]:
            wanted += [(name, other) for name in ([other.provider] if other.provider else ["copy"])]
        made: dict[int, Provider] = {}
        gone: dict[tuple[str, str], catalog.Unavailable] = {}
        for name, owner in wanted:
            try:
                instance = self.provider(name, owner, chosen=False)
            except Exception as error:  # be it a bug of a third party's driver, as in `catalog.read`
                line = foreseen(error, name).line()
                gone[(name, line)] = catalog.Unavailable(name, line)
                continue
            made[id(instance)] = instance
        answer = list(made.values()), list(gone.values())
        if usual:
            self._everywhere = answer
        return answer

    def _may_see(self, name: str) -> bool:
        """Whether a provider could see anything of ours with no node's options: not loaded where that is certain."""
        said = {"ebs": self.config.aws != Aws(), "gce": self.config.gcp != Gcp()}.get(name, False)
        return said or bool(self.options) or name in (self.provider_name, self.only) or provider.may_be_here(name)

    def node_of(self, target: str) -> Node | None:
        """The config's node of this target's identity, if it has one."""
        return next((node for node in self.config.nodes.values() if target_of(node) == target), None)

    def catalog(self, set_id: str | None = None, node: Node | None = None) -> catalog.Catalog:
        """Everything that is ours now, through every provider that can be asked."""
        providers, gone = self.everywhere(node)
        return catalog.read(providers, gone, set_id)

    def again(self, found: SnapshotSet) -> SnapshotSet | None:
        """The set as it is now, asked of the providers that it names; None if it is gone."""
        names = {member.provider for member in found.birth.members}
        providers, gone = self.everywhere()
        now = catalog.read(
            [instance for instance in providers if instance.name in names],
            [entry for entry in gone if entry.provider in names],
            found.set_id,
        )
        if not now.sets and now.unavailable:
            raise PreconditionError(f"can't be asked now: {now.unavailable[0].reason}", object=found.set_id)
        return next((entry for entry in now.sets if entry.set_id == found.set_id), None)

    def providers_of(self, found: SnapshotSet) -> list[Provider]:
        """The instances that hold members of this set. One that can't be asked is needed only where no other holds
        them: then its error is raised, or PreconditionError."""
        holding: list[Provider] = []
        providers, _ = self.everywhere()
        for name in sorted({member.provider for member in found.birth.members}):
            listed = any(snapshot.provider == name for snapshot in found.snapshots)
            able = [instance for instance in providers if instance.name == name]
            if listed and len(able) == 1:
                holding += able
                continue
            failed: list[SnapshotterError] = []
            here = [instance for instance in able if _holds(instance, found.set_id, failed)]
            if here:
                holding.append(here[0])
            elif failed:
                raise failed[0]
            elif listed:
                raise PreconditionError("its provider can't be asked now", object=f"{found.set_id} ({name})")
        return holding

    def select(self, selector: str, *, careful: bool = False, from_host: bool = False) -> SnapshotSet:
        """The set that a person means: an id, a prefix, `latest[:TARGET]`, `latest-verified[:TARGET]`."""
        word, colon, target = selector.partition(":")
        if word not in ("latest", "latest-verified"):
            return self.catalog().pick(selector, careful=careful, from_host=from_host)
        identity = self._target_of(target if colon else None)
        entries = self.catalog()
        found = entries.newest_good(identity) if word == "latest" else entries.newest_verified(identity)
        if found is None:
            kind = "good" if word == "latest" else "verified"
            raise NotFoundError(
                f"there is no {kind} set", object=selector, cure="`snapshotter list` shows what there is"
            )
        for other in entries.of_target(identity):
            if other.state is State.UNKNOWN and other.sealed and entries.may_be_newest(other):
                self.notes.append(f"{other.set_id} is newer than {found.set_id}, and can't be used now: {other.why}")
        self.notes += [
            f"{gone.provider} can't be asked, and may hold a newer set than {found.set_id}: {gone.reason}"
            for gone in entries.unavailable
        ]
        return found

    def _target_of(self, name: str | None) -> str:
        """The identity of a target whose path may be gone: a restore must work then."""
        try:
            return target_of(resolve(name, self.config, must_exist=False))
        except UsageError:
            if name is not None:
                raise
            # Without a config, `latest` can still be meant: when there are sets of one target only.
            targets = {found.birth.target for found in self.catalog().sets}
            if len(targets) == 1:
                return targets.pop()
            raise


def _holds(instance: Provider, set_id: str, failed: list[SnapshotterError]) -> bool:
    with put_off(failed):
        return next(iter(instance.snapshots(set_id)), None) is not None
    return False
