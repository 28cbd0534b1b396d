"""Many runs as one experiment: local, federated and pooled training compared, and grids of settings.

Every run is a whole federation in a process of its own, kept in its own run folder under the
experiment's folder and reused as long as configuration, data and version are the same.

* The two: `compare` with its `arms`, `sweep` over settings.
* Their data: `dealing` to virtual hospitals, `pooling` of all sites' into one.
* Their runs: `running` side by side, `reuse` of finished ones.
* What they amount to: `predictions` of every network, `judging` of those, `subgroups` of images.
"""
