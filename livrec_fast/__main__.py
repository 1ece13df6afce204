"""`python -m livrec_fast` is `livrec-fast`."""

from .cli import main

main(prog_name="livrec-fast")
