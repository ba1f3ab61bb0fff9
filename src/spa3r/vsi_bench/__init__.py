"""VSI-Bench: its format, its official scores, and confidence intervals."""
