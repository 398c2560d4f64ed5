"""The `pvt-hf` command line: one file per subcommand, each a thin program with `main(argv)`."""
