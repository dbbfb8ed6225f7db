"""How soon a concept is like its photos: the default, `lora` and the trainers of others on one base."""
