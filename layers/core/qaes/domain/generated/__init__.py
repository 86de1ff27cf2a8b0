"""Code that a program wrote; each file names the program."""
