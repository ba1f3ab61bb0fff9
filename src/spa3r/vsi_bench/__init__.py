"""VSI-Bench: its format, its official scores, and their intervals."""
