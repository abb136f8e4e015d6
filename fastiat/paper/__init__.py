"""The paper's tables: as published, planned, and beside our results."""
