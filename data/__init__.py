"""Tasks, their official files, tokenizers, option scoring, and checkpoints from the Hugging Face hub."""
