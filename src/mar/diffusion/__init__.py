"""The diffusion of one token: schedule, process and loss, samplers, and the head that denoises."""
