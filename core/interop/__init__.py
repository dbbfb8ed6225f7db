"""Reads and writes files of other programs: kohya and diffusers LoRA files, embedding files."""
