"""Whole models in memory. Importing this package lets transformers' Auto classes load ``upcycle_moe`` folders."""

from __future__ import annotations

from upcycle.models.own.registration import register_wrapper

register_wrapper()
