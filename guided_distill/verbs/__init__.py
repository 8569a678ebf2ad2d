"""The verbs of the command line: the flags of each, and the call that it makes."""
