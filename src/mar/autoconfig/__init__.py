"""Choose sizes, models and steps for a data set."""
