"""The federation: the round loop, what it sends, how it adds up, and the grids that it runs over.

* Way in: `federation` runs one over any grid, `simulation` on one machine; `server_app` and `client_app` are
  Flower's.
* The rounds: `rounds`, with `membership`, `member` and `selection` of the sites, `progress` and `identity`.
* What is sent: `wire` as Flower's records, `exchange` question by question, `admission` of what comes back.
* How it adds up: `aggregation`, `combiners` and `strategies`; `central` for noise at the server, `unmasking` for
  secure sums.
* Judging: `server_evaluation`, `site_evaluation` and `evaluation_details`.
* What is left: `run_folder`, `result`, and `resume` to go on.
* Workers of one machine: `local_grid`, `local_pool`, `local_fork_server` and `local_worker`; `spool` carries their
  arrays.
* Which hospitals: `sites` and `site_config`; `virtual_hospitals`, `partition` and `phantoms` in a simulation.
"""
