"""Pretraining of a Spa3R (PSFM)."""
