"""The random starts of attacks, and the checks of their arguments."""
