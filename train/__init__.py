"""Fine-tuning on a mesh. `step` is a pure function, `loop` runs it, `recipes` are whole training runs."""
