"""Tasks and their official files, tokenizers, and option scoring; tiny/ is the embedded model and task."""
