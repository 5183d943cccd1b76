"""Passes chained, checked and reported; rules applied until none fires."""
