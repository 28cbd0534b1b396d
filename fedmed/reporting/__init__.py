"""Turns a run folder into pages that open offline, and follows a run that is not over.

* Of a run: `report`, `site_report` for each site, `model_card`; `live` while it goes on, `writers` for other programs.
* Of others: `comparison` for experiments and sweeps, `data_check` of a manifest, `quarantine`,
  `budget` of a plan.
* What they know: `facts`, from `read` of a run folder and `read_evaluation`; `values` of JSON.
* How they say it: `pages` from templates, `words` for numbers and names.
* Plots, on one `canvas`: `figures` of rounds and sites, `curves` and `cases` of held-out patients, `label_map` of sites
  and labels, `comparison_figures`.
"""

from __future__ import annotations

from fedmed.reporting.model_card import write_model_card
from fedmed.reporting.report import write_report
from fedmed.reporting.site_report import write_site_reports

__all__ = ["write_model_card", "write_report", "write_site_reports"]
