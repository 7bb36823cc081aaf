"""The Lion step."""
