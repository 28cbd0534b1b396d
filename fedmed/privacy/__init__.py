"""What a release costs and how it is made private: accountants, planning, secret noise, and the hospital's own ledger.

A release is a `fedmed.types.PrivacyEvent`, plain data. `accounting` turns events into ε, `calibration` turns ε into
noise, `planning` shows both before anything runs, `noise` draws what nobody may predict, `central` is the arithmetic of
differential privacy at the server. None of them trains, reads an image or talks to anybody.
"""
