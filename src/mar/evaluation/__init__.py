"""Evaluation: uint8 images in, numbers out. Sets of images compose; disk is optional."""
