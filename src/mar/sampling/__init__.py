"""Labels and seeds -> latents, one reveal step at a time."""
