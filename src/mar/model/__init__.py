"""The transformer: known tokens of an image -> a condition z for each unknown one."""
