"""What a release costs and how it is made private: accountants, planning, secret noise, and the hospital's own ledger.

A release is a `fedmed.types.PrivacyEvent`, plain data. None of what is here trains, reads an image or talks to anybody.

* Events and ε: `accounting` turns events into ε, by `opacus_prv` and `renyi`; `calibration` turns ε into noise,
  `planning` shows both before anything runs.
* Noise: `noise` draws what nobody may predict, `grid` is for numbers in float64; `central` is the arithmetic of
  differential privacy at the server.
* Sums of which the server learns the total alone: `secure_sum`.
* What a hospital allows: its `policy`, and its `ledger` with a `cohort` for each task; `rdp_filter` is the ledger's
  gate, `balance` who has spent what, `refusals` why not and what instead, `storage` its database.
* Records: `keys` sign a `chain`, kept as a `chain_file`: `audit_log` of what was decided, `egress` of what left;
  `verification` of them all.
"""
