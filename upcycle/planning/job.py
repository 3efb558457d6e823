"""The job that a recipe and a checkpoint make."""

from __future__ import annotations

from typing import TypeAlias

from upcycle.planning.expert_job import Job
from upcycle.planning.growth_job import GrowthJob

AnyJob: TypeAlias = Job | GrowthJob
