"""Diffusion of one token: schedule, process, loss, solvers and head."""
