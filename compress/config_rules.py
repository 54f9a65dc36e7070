"""Rules that settings share; each names the setting, its value and the rule."""

from __future__ import annotations

from compress.errors import ConfigError


def positive(cls: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):  # NaN fails too
            raise ConfigError(f"{cls}.{name}={value} must be positive and finite")


def at_least(least: float, cls: str, why: str = "", **values: float) -> None:
    for name, value in values.items():
        if not least <= value < float("inf"):
            raise ConfigError(f"{cls}.{name}={value} must be at least {least}{why and ': ' + why}")
