"""The command line, ``spa3r``."""
