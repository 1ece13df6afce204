"""The ops' faces: docstring, checks, schema, fake, gradients and ordered backends, a file per stem."""
