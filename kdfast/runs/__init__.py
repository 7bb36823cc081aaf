"""A run on disk: its files, their content, and functions that read them back."""
