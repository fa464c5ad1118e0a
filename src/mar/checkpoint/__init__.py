"""Weights and runs on the disk: our files, a run's state, the reference's files, downloads."""
