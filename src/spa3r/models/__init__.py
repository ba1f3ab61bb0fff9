"""The three models, from the geometry backbone upwards: ``vggt`` -> ``spa3r`` -> ``spa3_vlm``."""
