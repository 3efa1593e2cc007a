"""Programs that keep the documentation: `make docs` runs them all."""
