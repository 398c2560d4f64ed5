"""The command line `pvt-hf`: one module per command, each a thin program with `main(argv)`."""
