"""The transformer: known tokens -> a condition z for each masked token."""
