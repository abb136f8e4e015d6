"""What every stage needs from the machine: errors, settings, files, ranks, signals."""
