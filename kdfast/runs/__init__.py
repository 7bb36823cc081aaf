"""What a run is on disk: its files, what they say, and how to read them back."""
