"""Two models side by side, and the requirements on what was found."""
