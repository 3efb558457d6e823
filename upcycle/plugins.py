"""Bases of everything that users set by name: recipes, and the parameters of plug-ins."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictSettings(BaseModel):
    """Settings with fixed names: an unknown name is an error, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginParameters(StrictSettings):
    """Parameters of one plug-in (a method, a router, a loss, ...); every field has a help text."""
