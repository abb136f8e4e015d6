"""What the report's page is made of: figures, charts, examples."""
