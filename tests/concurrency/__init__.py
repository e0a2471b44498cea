"""What the contract claims of several connections at once."""
