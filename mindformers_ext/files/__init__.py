"""Writing and reading files: whole or not at all, fast, and in the format of safetensors."""
