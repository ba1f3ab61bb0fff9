"""Answering questions about pictures with a VLM."""
