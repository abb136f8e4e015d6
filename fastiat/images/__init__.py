"""Where images come from: downloads, image trees, .beton files, conversion."""
