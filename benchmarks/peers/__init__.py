"""What is compared from elsewhere, and the searches for every peer's best settings."""
