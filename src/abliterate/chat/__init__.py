"""A conversation with a base model, a trial or an export."""
