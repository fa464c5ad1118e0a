"""Pictures -> weights: the loss, the loop, and all that a run keeps so that nothing is lost."""
