"""The command line: a file for each verb, with its flags (`Args`), what it does (`run`) and its help (docstring)."""
