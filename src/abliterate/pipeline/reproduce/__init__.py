"""Make a trial again from its recipe, and compare the two."""
