"""The parts of one update, the output of a training, and how it is saved and resumed."""
