"""Many runs as one experiment: local, federated and pooled training compared, and grids of settings.

Every run is a whole federation through `run_federation`, in a process of its own, kept in its own run folder under the
experiment's folder and reused as long as configuration, data and version are the same.
"""
