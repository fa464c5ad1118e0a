"""Train models and tokenizers: loss, loop, optimizers, state of a run."""
