"""Training of dense and dynamic models from recipes."""
