"""Depth Anything 3, a geometry backbone: views, with cameras or without -> tokens, cameras and depth."""
