"""Weights and runs on the disk, the authors' files, downloads."""
