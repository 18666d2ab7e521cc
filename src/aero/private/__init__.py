"""The answer nobody sees: the private program, its engine, its parties and its account."""
