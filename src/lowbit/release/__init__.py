"""A release: the files that ship together, the lock file that names them, and the checks that they belong together."""
