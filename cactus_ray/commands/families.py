"""The options that ask for a family: ``--family``, ``--family-radius`` and ``--family-zeros``."""

from __future__ import annotations

from dataclasses import dataclass

from cactus_ray.compression.family import INTEGERS, RADII, ZEROS, Family
from cactus_ray.compression.levels import Level, parse_level
from cactus_ray.deploy.members import refuse_integers
from cactus_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FamilyOptions:
    """The options as they are given; ``zeros`` None: as the level wants."""

    format: str
    radius: str = "half"
    zeros: str | None = None

    @staticmethod
    def of(name: str | None, radius: str | None, zeros: str | None) -> FamilyOptions | None:
        """None without ``--family``; then the other two are refused (ConfigError)."""
        if name is not None:
            return FamilyOptions(name, radius or "half", zeros)
        for option, value in (("--family-radius", radius), ("--family-zeros", zeros)):
            if value is not None:
                raise ConfigError(option, value, "--family FORMAT beside it, such as --family int8")
        return None

    def at(self, level: str, place: str = "--levels") -> Family:
        """The family around a level's network; exact zeros stay 0 where the level prunes, unless told otherwise.

        Raises ConfigError for values that are none, and, naming ``place``, for a level that holds integers already.
        """
        try:
            of = parse_level(level)
        except ConfigError:  # a file that we did not make
            of = Level()
        zeros = self.zeros or ("free" if of.prune_family is None else "fixed")
        for option, value, allowed in (
            ("--family", self.format, INTEGERS),
            ("--family-radius", self.radius, tuple(RADII)),
            ("--family-zeros", zeros, ZEROS),
        ):
            if value not in allowed:
                raise ConfigError(option, value, f"one of {', '.join(allowed)}")
        family = Family(format=self.format, radius=self.radius, zeros=zeros)
        refuse_integers(of, family, place)
        return family
