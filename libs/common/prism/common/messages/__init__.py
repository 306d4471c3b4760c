"""What travels on the bus: one module a conversation, JSON by msgspec everywhere."""
