"""SVF experts inside other libraries."""
