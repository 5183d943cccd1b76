"""What passes that learn share: a model in operators that PyTorch knows, and the lessons of a teacher."""
