"""The transformer: tokens of an image, which are known, and a condition for each that is not."""
