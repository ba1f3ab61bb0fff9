"""Serving a model over HTTP in the form of OpenAI's API: ``spa3r serve``."""
