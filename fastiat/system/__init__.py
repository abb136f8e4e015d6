"""Code that all stages share: errors, settings, flags, files, ranks, signals, progress, tables."""
