"""Spa3R: unposed views -> one view-invariant latent -> the feature field of any camera."""
