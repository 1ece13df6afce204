"""The ops' faces: docstring, checks, schema, fake, gradients and ordered backends, by stem."""
