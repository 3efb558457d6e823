"""What every plug-in can be told."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PluginParameters(BaseModel):
    """A plug-in's own parameters; every field has a help text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
