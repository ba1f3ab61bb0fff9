"""Fine-tuning of a Spa3-VLM."""
