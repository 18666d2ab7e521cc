"""The secure engine emulated in plaintext: the private program in the integers modulo 2^64 or 2^32, by one process."""
