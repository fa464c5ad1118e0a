"""Pictures from a folder, a table or the package, in an order that can be resumed, as batches of tensors."""
