"""The feature table: its files, its rows, and the one door by which they are committed."""
