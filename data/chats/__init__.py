"""Chats: rows of a data set that hold turns, the template that makes text of them, and rows of tokens of which the
answers alone are learned."""
