"""Pictures and videos from wherever users have them: files, URLs, bytes, text, arrays."""
