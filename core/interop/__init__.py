"""Files that other programs read: kohya and diffusers LoRA files, embedding files."""
