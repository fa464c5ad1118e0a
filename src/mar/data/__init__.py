"""Images from anywhere, as batches of tensors in a resumable order."""
