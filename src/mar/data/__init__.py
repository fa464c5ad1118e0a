"""Pictures by number or in passing, in an order that can be resumed, as batches of tensors."""
