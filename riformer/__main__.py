"""`python -m riformer VERB ...`, also under torchrun."""

from riformer_cli import main

main()
