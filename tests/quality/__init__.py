"""What the methods are worth on the zoo's models; each with a command of its own, and a small part in CI."""
