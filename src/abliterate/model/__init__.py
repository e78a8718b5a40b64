"""Models and tokenizers: loading them, rendering chat prompts, capturing residuals, and editing weights while they are used."""
