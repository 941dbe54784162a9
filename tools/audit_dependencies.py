"""Hold installed packages and the lower bounds of pyproject.toml against known advisories.

Reads tools/advisories.toml, no network. One line for each fault; exit code 1 when there is one.
Lower bounds count because they are what a fresh installation elsewhere may get.
"""

import argparse
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Advisory:
    """One entry of tools/advisories.toml."""

    package: str
    id: str
    affected: str
    what: str
    unreached: str = ""

    def hits(self, version: Version) -> bool:
        """Whether a version is affected."""
        return SpecifierSet(self.affected).contains(version.public, prereleases=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is found; 1 when something must be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=ROOT / "pyproject.toml")
    parser.add_argument("--advisories", type=Path, default=ROOT / "tools/advisories.toml")
    arguments = parser.parse_args(argv)
    with arguments.advisories.open("rb") as file:
        advisories = [Advisory(**entry) for entry in tomllib.load(file)["advisory"]]
    with arguments.project.open("rb") as file:
        project = tomllib.load(file)["project"]
    bounds = lower_bounds(project)
    found = list(faults(advisories, bounds, installed))
    for line in found:
        print(f"audit_dependencies: {line}", file=sys.stderr)
    if found:
        return 1
    accepted = sum(bool(advisory.unreached) for advisory in advisories)
    print(f"{len(advisories)} advisories, none applies ({accepted} in code that is not reached)")
    return 0


def lower_bounds(project: Mapping[str, object]) -> dict[str, Version | None]:
    """The lowest version that each dependency allows, None where it has no lower bound."""
    written = project.get("dependencies", [])
    extras = project.get("optional-dependencies", {})
    assert isinstance(written, list) and isinstance(extras, dict)
    bounds: dict[str, Version | None] = {}
    for line in [*written, *(line for extra in extras.values() for line in extra)]:
        needed = Requirement(line)
        lowest = [Version(s.version) for s in needed.specifier if s.operator in (">=", "==", "~=")]
        bounds[canonicalize_name(needed.name)] = max(lowest, default=None)
    return bounds


def installed(package: str) -> Version | None:
    """The version that is installed here, or None."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def faults(
    advisories: Sequence[Advisory],
    bounds: Mapping[str, Version | None],
    version_of: Callable[[str], Version | None],
) -> Iterator[str]:
    """One line for each advisory that applies to what is installed or what may be installed."""
    for advisory in advisories:
        if advisory.unreached:
            continue
        name = canonicalize_name(advisory.package)
        about = f"{advisory.affected} is affected by {advisory.id}: {advisory.what}"
        here = version_of(name)
        if here is not None and advisory.hits(here):
            yield f"{name} {here} is installed, {about}; update it"
        if name not in bounds:
            continue
        bound = bounds[name]
        if bound is None:
            yield f"pyproject.toml gives {name} no lower bound, {about}; set one"
        elif advisory.hits(bound):
            yield f"pyproject.toml allows {name} {bound}, {about}; raise the bound"


if __name__ == "__main__":
    sys.exit(main())
