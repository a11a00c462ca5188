"""What talks with people: a conversation in a terminal, the API and its page; the engine is handed in."""
