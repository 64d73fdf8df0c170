"""What a YAML asks for: read, checked and typed; needs no MindSpore."""
