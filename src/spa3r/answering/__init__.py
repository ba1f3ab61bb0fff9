"""From pictures and questions to answers."""
