"""From messages, pictures and videos to arrays: numpy, Pillow, tokenizers and jinja2. Imports no jax."""
