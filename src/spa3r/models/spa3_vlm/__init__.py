"""Spa3-VLM: any vision-language model of transformers, married to a Spa3R."""
