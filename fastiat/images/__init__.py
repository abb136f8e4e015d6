"""Sources of images: downloads, image trees, .beton files, and conversion between them."""
