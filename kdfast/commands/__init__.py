"""The commands of the command line, one file each; they can be called from Python as well."""
