"""The paper's tables: as published, as planned trainings, and next to our results."""
