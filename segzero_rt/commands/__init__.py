"""One module per subcommand of `segzero`; each has NAME, HELP, `configure(parser)` and `execute(arguments)`."""
