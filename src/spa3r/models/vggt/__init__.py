"""VGGT, the geometry backbone: unposed views -> tokens, cameras, depth and points."""
