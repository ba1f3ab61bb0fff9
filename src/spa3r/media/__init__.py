"""Loading pictures and videos from files, URLs, bytes, text and arrays."""
