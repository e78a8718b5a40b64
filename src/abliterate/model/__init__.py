"""Models, tokenizers and what is done to them: loading, chat rendering, residual capture, adapters."""
