"""What is measured beside the package: peers from elsewhere, and how to run them."""
