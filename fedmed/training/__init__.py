"""What happens at a site: load, train, evaluate, and hand back one update.

* Way in: `site_round` answers one task; `site` is the hospital, `run_data` its data set, `own_patients` a network on
  its patients, `fitting` tries the three together before a run.
* Policy and ledger: `oversight` asks before a task and tells after it; `account`, `terms`, `reserving`,
  `site_privacy` and `site_cohort` say what a round costs and whom; `discretion` keeps a failure's words back.
* Ordinary training: `loop`, with `losses`, `schedule`, `sampling`, `gradients` and `precision`; `network` is what
  travels, `moments` joins running variances, `local_algorithms` what a site does in a round.
* DP-SGD: `private`, with `clipping`, `coupling` and `filling`.
* Secure sums: `masking`, and `mask_record` of what was masked and opened.
* Kept at the site: `site_state` from round to round, `unfinished` within one, `local_baseline` beside the run.
* Judging: `evaluate`, `noised_metrics` in a private run, `tiles` for whole volumes; `local_findings`, `case_pictures`
  and `heat_maps` for the site alone; `predict` with a network that was kept.
"""
