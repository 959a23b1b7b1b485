"""Options of the command line: how they are made, read and told apart."""
