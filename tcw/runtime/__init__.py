"""Models that run: load.py gives one, quantizer.py is the hook in transformers, residency.py says where weights lie."""
