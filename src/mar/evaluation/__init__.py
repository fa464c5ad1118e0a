"""Evaluation: uint8 images in, metrics out, without writing an image to disk."""
