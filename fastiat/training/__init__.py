"""What one update consists of, and how a training is saved and resumed."""
