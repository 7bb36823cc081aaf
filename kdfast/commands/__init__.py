"""What the command line does, one command a file, callable from Python as well."""
