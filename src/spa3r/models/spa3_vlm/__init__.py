"""Spa3-VLM: any vision-language model of transformers, combined with a Spa3R."""
