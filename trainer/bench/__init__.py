"""Which of several is better, by how much, and how sure one may be of it."""
