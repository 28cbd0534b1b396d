"""Turns a run folder into one HTML page that opens offline."""

from __future__ import annotations

from fedmed.reporting.model_card import write_model_card
from fedmed.reporting.report import write_report

__all__ = ["write_model_card", "write_report"]
