"""The loop of PGD, its random starts, images that are normalised already, checks of arguments."""
