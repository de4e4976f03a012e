"""What crosses the wire: the contract, its generated code, tensor layout and framing."""
