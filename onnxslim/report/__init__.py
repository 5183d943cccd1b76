"""What was done and found, as text, HTML and JSON."""
