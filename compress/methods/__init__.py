"""Quantization methods: one paper a file, pure functions of tensors."""
