"""The gRPC front process."""
