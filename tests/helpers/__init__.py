"""What several test modules build: tiny pipelines, bundles, training sets."""
