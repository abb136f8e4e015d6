"""The settings of a training, and the groups of settings that commands share."""
