"""Generated protobuf and gRPC code of the wire contract in proto/: `make proto` writes it."""
