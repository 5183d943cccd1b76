"""Recipe files, and the data that they name."""
