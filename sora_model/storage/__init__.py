"""Files that are written whole, and files of others, read safely."""
