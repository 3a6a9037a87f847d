"""A model's weights on disk and in memory: loading, targets, factor cache, and estimates of what they take."""
