"""Turns a run folder into pages that open offline, and follows a run that is not over."""

from __future__ import annotations

from fedmed.reporting.model_card import write_model_card
from fedmed.reporting.report import write_report
from fedmed.reporting.site_report import write_site_reports

__all__ = ["write_model_card", "write_report", "write_site_reports"]
