"""Records: what a line, a row or a file asks for, read once for batch jobs and training alike. No jax in here."""
